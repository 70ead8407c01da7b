//! Files that describe a VM, and files that do not.

use std::path::Path;
use std::time::Duration;

use super::*;

fn toml(text: &str) -> Result<VmFile, String> {
    VmFile::parse(Path::new("conf/vm.toml"), text.as_bytes()).map_err(|error| error.to_string())
}

fn json(text: &str) -> Result<VmFile, String> {
    VmFile::parse(Path::new("conf/vm.json"), text.as_bytes()).map_err(|error| error.to_string())
}

const WHOLE_TOML: &str = r#"
name = "build"
labels = { team = "ci", tier = "1" }
cpus = 2
memory = "1G"
kernel = "vmlinux"
image = "/srv/image"
image_as = "block"
cmdline = "debug"
timeout = "5m"

[[drives]]
path = "data.img"

[[drives]]
path = "../toolchain.erofs"
read_only = true

[agent]
env = { LANG = "C.UTF-8" }
cwd = "/work"
"#;

const WHOLE_JSON: &str = r#"{
  "name": "build", "labels": {"team": "ci", "tier": "1"}, "cpus": 2, "memory": 1024,
  "kernel": "vmlinux", "image": "/srv/image", "image_as": "block", "cmdline": "debug", "timeout": 300,
  "drives": [{"path": "data.img"}, {"path": "../toolchain.erofs", "read_only": true}],
  "agent": {"env": {"LANG": "C.UTF-8"}, "cwd": "/work"}
}"#;

#[test]
fn toml_and_json_say_the_same() {
    let file = toml(WHOLE_TOML).unwrap();
    assert_eq!(json(WHOLE_JSON).unwrap(), file);
    assert_eq!(file.memory, Some(1024));
    assert_eq!(file.timeout, Some(Duration::from_secs(300)));
    assert_eq!(file.image_as, Some(DriveInterface::Block));
    assert_eq!(file.labels["team"], "ci");
    assert_eq!(file.agent.env["LANG"], "C.UTF-8");
}

#[test]
fn paths_are_relative_to_the_file() {
    let file = toml(WHOLE_TOML).unwrap();
    assert_eq!(file.kernel.unwrap(), Path::new("conf/vmlinux"));
    assert_eq!(file.image.unwrap(), Path::new("/srv/image"));
    assert_eq!(file.drives[0].path, Path::new("conf/data.img"));
    assert_eq!(file.drives[1].path, Path::new("conf/../toolchain.erofs"));
    let here = VmFile::parse(Path::new("vm.toml"), b"kernel = 'vmlinux'").unwrap();
    assert_eq!(here.kernel.unwrap(), Path::new("vmlinux"));
}

#[test]
fn the_readme_tells_the_truth() {
    let readme = include_str!("../../../README.md");
    let (_, rest) = readme.split_once("```toml\n").unwrap();
    let (example, _) = rest.split_once("```").unwrap();
    let file = toml(example).unwrap();
    assert_eq!(file.name.as_deref(), Some("build"));
    assert_eq!(file.drives.len(), 2);
    assert!(file.drives[1].read_only);
    assert_eq!(file.agent.cwd.as_deref(), Some("/tmp"));
}

#[test]
fn an_empty_file_says_nothing() {
    assert_eq!(toml("").unwrap(), VmFile::default());
    assert_eq!(json("{}").unwrap(), VmFile::default());
}

#[test]
fn the_syntax_is_told_by_extension_then_by_content() {
    for (path, text, syntax) in [
        ("a.toml", "{", Syntax::Toml),
        ("a.JSON", "cpus = 1", Syntax::Json),
        ("a", " \n{}", Syntax::Json),
        ("a.conf", "cpus = 1", Syntax::Toml),
    ] {
        assert_eq!(Syntax::of(Path::new(path), text), syntax, "{path}");
    }
    let marked = VmFile::parse(Path::new("vm"), "\u{feff}{\"cpus\": 3}".as_bytes());
    assert_eq!(marked.unwrap().cpus, Some(3));
}

#[test]
fn sizes_and_times_are_numbers_or_text() {
    for (text, mib) in [
        ("512", 512),
        ("'512'", 512),
        ("'256M'", 256),
        ("'2GiB'", 2048),
    ] {
        assert_eq!(toml(&format!("memory = {text}")).unwrap().memory, Some(mib));
    }
    for (text, millis) in [("2", 2000), ("1.5", 1500), ("'200ms'", 200)] {
        let timeout = toml(&format!("timeout = {text}")).unwrap().timeout;
        assert_eq!(timeout, Some(Duration::from_millis(millis)), "{text}");
    }
}

/// Each file with the message that it gets, which is one line.
#[test]
fn mistakes_are_named_with_their_place() {
    for (text, message) in [
        // Syntax.
        ("cpus = 2\nmemory = = 1\n", "conf/vm.toml:2:10: "),
        ("cpus = 1\ncpus = 2\n", "conf/vm.toml:2:1: duplicate key"),
        // Values.
        (
            "\ncpus = 'two'\n",
            "conf/vm.toml:2: cpus: invalid type: string \"two\", expected a number from 1 to 32",
        ),
        (
            "cpus = 33",
            "conf/vm.toml:1: cpus: invalid value: integer `33`, expected a number from 1 to 32",
        ),
        (
            "cpus = -1",
            "cpus: invalid value: integer `-1`, expected a number from 1 to 32",
        ),
        (
            "memory = 'lots'",
            "conf/vm.toml:1: memory: \"lots\" will not do: unknown unit",
        ),
        (
            "memory = 1.5",
            "memory: invalid value: floating point `1.5`, expected MiB as a number",
        ),
        (
            "memory = true",
            "memory: invalid type: boolean `true`, expected MiB as a number",
        ),
        (
            "timeout = 0",
            "timeout: \"0\" will not do: give a duration above zero",
        ),
        (
            "tree_sandboxes = 1.5",
            "conf/vm.toml:1: tree_sandboxes: invalid value: floating point `1.5`, expected a number of sandboxes",
        ),
        (
            "tree_memory = 'all'",
            "tree_memory: \"all\" will not do: unknown unit",
        ),
        (
            "tree-memory = 1",
            "unknown key tree-memory: did you mean tree_memory?",
        ),
        ("timeout = -1.0", "timeout: invalid value"),
        (
            "kernel = 1",
            "kernel: invalid type: integer `1`, expected a string",
        ),
        (
            "kernel = ''",
            "kernel: invalid value: string \"\", expected the path of a file",
        ),
        (
            "image_as = 'nvme'",
            "image_as: unknown variant `nvme`, expected `block` or `pmem`",
        ),
        (
            "labels = { a = 1 }",
            "labels.a: invalid type: integer `1`, expected a string",
        ),
        (
            "drives = 'x'",
            "drives: invalid type: string \"x\", expected a sequence",
        ),
        (
            "[[drives]]\npath = 'a'\n\n[[drives]]\npath = 'b'\nread_only = 'yes'\n",
            "conf/vm.toml:6: drives[1].read_only: invalid type: string \"yes\", expected a boolean",
        ),
        (
            "\n\n[[drives]]\nread_only = true\n",
            "conf/vm.toml:3: drives[0]: missing field `path`",
        ),
        (
            "agent.env = { '' = 'x' }",
            "agent.env: \"\" cannot be a variable",
        ),
        // Keys.
        (
            "cpus = 1\n\nmemroy = 1\n",
            "conf/vm.toml:3: unknown key memroy: did you mean memory?",
        ),
        (
            "image-as = 'pmem'",
            "conf/vm.toml:1: unknown key image-as: did you mean image_as?",
        ),
        ("mem = 128", "unknown key mem: did you mean memory?"),
        (
            "[[drive]]\npath = 'x'",
            "unknown key drive: did you mean drives?",
        ),
        (
            "[[drives]]\npath = 'a'\nreadonly = true\n",
            "conf/vm.toml:3: unknown key drives[0].readonly: did you mean read_only?",
        ),
        (
            "[agent]\nenvironment = {}\n",
            "conf/vm.toml:2: unknown key agent.environment: did you mean env?",
        ),
        (
            "xyzzy = 1",
            "unknown key xyzzy: known here are name, labels, cpus, memory,",
        ),
    ] {
        let error = toml(text).unwrap_err();
        assert!(error.contains(message), "{text:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn mistakes_in_json_are_named_with_their_place() {
    for (text, message) in [
        (
            "{\"cpus\": 2,\n \"memory\" 1}",
            "conf/vm.json:2:11: expected `:`",
        ),
        ("{}\nx", "conf/vm.json:2:1: trailing characters"),
        ("", "conf/vm.json:1:1: EOF while parsing"),
        (
            "[]",
            "conf/vm.json:1: the file: invalid type: sequence, expected keys and values",
        ),
        (
            "{\n\"cpus\": \"two\"}",
            "conf/vm.json:2: cpus: invalid type: string \"two\", expected a number from 1 to 32",
        ),
        ("{\"cpus\": 1, \"cpus\": 2}", "duplicate field `cpus`"),
        (
            "{\"drives\": [\n{\"path\": \"a\", \"read_only\": 1}]}",
            "conf/vm.json:2: drives[0].read_only: invalid type: integer `1`, expected a boolean",
        ),
        (
            "{\n\"memroy\": 1}",
            "conf/vm.json:2: unknown key memroy: did you mean memory?",
        ),
        (
            "{\"agent\": {\"shell\": \"x\", \"cwd\": 1}}",
            "unknown key agent.shell: known here are env, cwd, user, warm",
        ),
    ] {
        let error = json(text).unwrap_err();
        assert!(error.contains(message), "{text:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
}

#[test]
fn what_is_no_text_is_refused() {
    let error = VmFile::parse(Path::new("vm"), b"cpus = 1\nname = '\xff'").unwrap_err();
    assert_eq!(error.to_string(), "vm:2:9: this is not UTF-8 text");
    let error = VmFile::read("/nonexistent/vm.toml".as_ref()).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("cannot read the configuration /nonexistent/vm.toml: No such file"),
        "{error}"
    );
    let error = VmFile::read("/dev".as_ref()).unwrap_err();
    assert!(matches!(error, ConfigFileError::NotAFile { .. }), "{error}");
    let long = tempfile::NamedTempFile::new().unwrap();
    long.as_file().set_len(SIZE_MAX + 1).unwrap();
    let error = VmFile::read(long.path()).unwrap_err();
    assert!(matches!(error, ConfigFileError::TooLong { .. }), "{error}");
}
