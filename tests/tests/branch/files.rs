//! The files that `vmm diff` tells.

use libtest_mimic::Failed;
use serde_json::Value;
use tests::sandboxes::Host;

use crate::guest::SHAPE;

/// Runs a shell's script as root.
fn sh(host: &Host, name: &str, script: &str) -> Result<(), Failed> {
    host.ok(&["exec", name, "--user", "root", "--", "sh", "-c", script])?;
    Ok(())
}

/// The lines about files.
fn files(host: &Host, names: &[&str]) -> Result<String, Failed> {
    let said = host.ok(&[&["diff"], names].concat())?.stdout;
    let is_file = |line: &&str| "ACDT".contains(&line[..1]) && line[1..].starts_with(' ');
    Ok(said.lines().filter(is_file).collect::<Vec<_>>().join("\n"))
}

fn expect(found: &str, expected: &[&str]) -> Result<(), Failed> {
    match found == expected.join("\n") {
        true => Ok(()),
        false => Err(format!("these files are told:\n{found}").into()),
    }
}

/// What two children of one parent have done to their files is told, and what was done before they branched off is not.
pub fn told() -> Result<(), Failed> {
    let host = Host::new()?;
    host.ok(&[&["start", "one"], &SHAPE[..2]].concat())?;
    let before = "cd /root; echo all >same; echo all >edited; echo all >gone; echo all >rewritten; mkdir dir; echo 1 >dir/inner
        echo of >/etc/both; rm -r /etc/skel; echo all >/tmp/same; echo all >/tmp/edited; ln -s same link; chmod 600 /etc/hosts";
    sh(&host, "one", before)?;
    expect(
        &files(&host, &["one"])?,
        &[
            "A /etc/both",
            "C /etc/hosts",
            "D /etc/skel",
            "A /root/dir",
            "A /root/dir/inner",
            "A /root/edited",
            "A /root/gone",
            "A /root/link",
            "A /root/rewritten",
            "A /root/same",
            "A /tmp/edited",
            "A /tmp/same",
        ],
    )?;
    host.ok(&["branch", "one", "kid", "-n", "2"])?;
    expect(&files(&host, &["kid-1", "kid-2"])?, &[])?;
    let first = "cd /root; echo ALL >edited; rm gone; echo all >rewritten; echo 1 >both-new; echo 1 >dir/first
        rm /etc/profile; echo 1 >/tmp/edited; printf x >\"$(printf 'odd\\n\\377')\"; ln -sfn elsewhere link";
    sh(&host, "kid-1", first)?;
    let second = "cd /root; echo 2 >both-new; mkdir -p /etc/skel; echo new >/etc/skel/x; echo more >>/etc/bash.bashrc; rm -r dir; mkdir dir";
    sh(&host, "kid-2", second)?;
    let said = files(&host, &["kid-1", "kid-2"])?;
    expect(
        &said,
        &[
            "C /etc/bash.bashrc",
            "A /etc/profile",
            "A /etc/skel",
            "A /etc/skel/x",
            "C /root/both-new",
            "D /root/dir/first",
            "D /root/dir/inner",
            "C /root/edited",
            "A /root/gone",
            "C /root/link",
            "D $'/root/odd\\n\\xff'",
            "T /root/rewritten",
            "C /tmp/edited",
        ],
    )?;
    let json: Value = serde_json::from_str(&host.ok(&["diff", "one", "kid-2", "--json"])?.stdout)?;
    let first = serde_json::json!({"change": "changed", "path": "/etc/bash.bashrc"});
    if json["files"][0] != first || !json["regions"].is_array() {
        return Err(format!("in JSON: {}", json["files"]).into());
    }
    untold(&host)
}

/// Where the files cannot be told, that is told, and pages and blocks are.
fn untold(host: &Host) -> Result<(), Failed> {
    host.ok(&["snapshot", "one", "base"])?;
    for (a, b, why) in [
        ("base", "one", "base is a snapshot"),
        ("one", "kid-1", "kid-1 is paused"),
    ] {
        if b == "kid-1" {
            host.ok(&["pause", "kid-1"])?;
        }
        let said = host.ok(&["diff", a, b])?.stdout;
        if !said.contains("memory") || !said.contains(&format!("files: not told: {why}")) {
            return Err(format!("{a} and {b}: {said}").into());
        }
    }
    host.refused(&["diff", "base"], &["no sandbox is called \"base\""])?;
    host.refused(&["diff", "kid-1"], &["is paused"])
}
