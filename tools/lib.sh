# shellcheck shell=bash
# Shared by every tool in this directory; source it, do not run it:
#
#     set -euo pipefail
#     . "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
#
# Progress goes to standard error, so that a tool's standard output is its answer alone.

# Where results live, outside the checkout: `cache_dir` can be deleted at any time, `data_dir` holds
# the links that the monitor follows by default.
# shellcheck disable=SC2034 # used by those who source this
readonly cache_dir="${XDG_CACHE_HOME:-$HOME/.cache}/bough"
# shellcheck disable=SC2034
readonly data_dir="${XDG_DATA_HOME:-$HOME/.local/share}/bough"

if [[ -t 2 && -z "${NO_COLOR:-}" ]]; then
    readonly _bold=$'\e[1m' _red=$'\e[31m' _plain=$'\e[0m'
else
    readonly _bold='' _red='' _plain=''
fi

# say WORD...: one line of progress.
say() {
    printf '%s%s:%s %s\n' "$_bold" "${0##*/}" "$_plain" "$*" >&2
}

# die WORD...: one line that says what went wrong and what to do, then exit status 1.
die() {
    printf '%s%s: error:%s %s\n' "$_red" "${0##*/}" "$_plain" "$*" >&2
    exit 1
}

# elapsed SINCE: the time since $SINCE, a value that $EPOCHREALTIME had, for a person ("0.42 s", "3 min 20 s").
elapsed() {
    local us=$((${EPOCHREALTIME/[.,]/} - ${1/[.,]/}))
    local s=$((us / 1000000))
    if ((s < 60)); then
        printf '%d.%02d s' "$s" $((us / 10000 % 100))
    else
        printf '%d min %02d s' $((s / 60)) $((s % 60))
    fi
}

# missing_packages PACKAGE...: those of the named Debian packages that are not installed.
missing_packages() {
    local package
    for package in "$@"; do
        [[ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" == installed ]] || echo "$package"
    done
}

# need_packages PACKAGE...: has the named Debian packages installed when it returns. Root gets them
# installed; anybody else is told the one line that does, and the tool ends.
need_packages() {
    local missing
    mapfile -t missing < <(missing_packages "$@")
    ((${#missing[@]})) || return 0
    local install=(apt-get install --yes --no-install-recommends "${missing[@]}")
    if ((EUID)); then
        die "missing packages; run: sudo apt-get update && sudo ${install[*]}"
    fi
    say "installing ${missing[*]}"
    # The lists may be absent (a fresh container) or older than the mirror: try as it is, then refresh them.
    as_apt "${install[@]}" 2>/dev/null && return 0
    as_apt apt-get update || die "apt-get update failed; see above"
    as_apt "${install[@]}" || die "could not install ${missing[*]}; see above"
}

# as_apt COMMAND...: apt asks nothing, and its chatter stays off standard output. A package manager
# that somebody else holds is waited for.
as_apt() {
    local command=$1
    shift
    DEBIAN_FRONTEND=noninteractive "$command" -q -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 "$@" >&2
}

# key: the cache key of what standard input says. Print every input of a result into it: versions,
# options, and the digests of files (sha256sum). Sixteen digits are plenty for a cache.
key() {
    sha256sum | cut -c1-16
}

# digest_files ROOT FILE...: one line per file, digest and name as seen from ROOT, so that a checkout
# that lies elsewhere gives the same key.
digest_files() {
    local root=$1
    shift
    (cd "$root" && sha256sum -- "$@")
}

# with_lock NAME COMMAND...: runs the command while holding the lock NAME of the cache, so that two
# builds of one thing take turns and the second finds the result of the first.
with_lock() {
    local name=$1
    shift
    mkdir -p "$cache_dir/locks"
    (
        if ! flock --nonblock 9; then
            say "waiting for another build of $name"
            flock 9
        fi
        "$@" 9>&-
    ) 9>"$cache_dir/locks/$name"
}

# stage ENTRY: makes and prints an empty directory beside the cache entry, to be filled and published.
stage() {
    mkdir -p "$(dirname "$1")"
    mktemp -d "$1.partial.XXXXXX"
}

# publish STAGED ENTRY: the staged directory becomes the cache entry, in one step: whoever finds the
# entry finds all of it. If another build was first, its result stands and ours goes.
publish() {
    chmod 755 "$1"
    if ! mv -T --no-clobber "$1" "$2" 2>/dev/null || [[ -e "$1" ]]; then
        rm -rf "$1"
    fi
    [[ -d "$2" ]] || die "could not publish $2"
}

# point LINK TARGET: makes LINK a symbolic link to TARGET, replacing what it was in one step.
point() {
    mkdir -p "$(dirname "$1")"
    ln -sfn "$2" "$1.$$"
    mv -T "$1.$$" "$1"
}

# runtime_dir: makes a directory for sandboxes, in memory where it can, as /run mostly is, and prints it.
runtime_dir() {
    mktemp -d -p /dev/shm 2>/dev/null || mktemp -d
}
