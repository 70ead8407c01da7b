//! Bad input: each a message of one line that names the thing and the remedy, exit status 2, nothing left behind.

use std::fs;
use std::process::ExitCode;

use libtest_mimic::Failed;
use tests::Needs::{Kvm, Nothing, Root};
use tests::{Vmm, test};
use vmm::config::{DriveConfig, DriveInterface};
use vmm::drive::Drive;

fn main() -> ExitCode {
    tests::main(vec![
        test(
            "output_that_cannot_be_written_is_an_error",
            Nothing,
            full_output,
        ),
        test("pipes_are_refused", Kvm, pipes),
        test("a_host_without_kvm_is_told_apart", Root, no_kvm),
        test(
            "a_user_without_permission_is_told_apart",
            Root,
            no_permission,
        ),
        test("doctor_reports_for_people_and_machines", Nothing, doctor),
        test(
            "arguments_that_make_no_sense_are_refused",
            Nothing,
            arguments,
        ),
        test("a_kernel_that_is_none_is_refused", Kvm, bad_kernels),
        test("a_truncated_kernel_is_refused", Kvm, truncated_kernel),
        test(
            "a_kernel_that_does_not_fit_is_refused",
            Kvm,
            too_large_kernel,
        ),
        test("a_missing_image_is_refused", Kvm, missing_image),
        test("a_file_describes_the_vm_under_the_flags", Kvm, config_file),
        test(
            "a_file_with_mistakes_is_refused_with_their_place",
            Nothing,
            bad_config_files,
        ),
        test("a_busy_drive_is_refused", Kvm, busy_drive),
        test("a_full_disk_is_named", Root, full_disk),
        test(
            "completions_and_manual_cover_every_command",
            Nothing,
            completions_and_manual,
        ),
        test("cpus_out_of_bounds_are_refused", Kvm, cpus),
        test("memory_out_of_bounds_is_refused", Kvm, memory),
    ])
}

/// Runs `vmm boot` with `arguments`, which must be refused with a line that holds `parts`.
fn refused(arguments: &[&str], parts: &[&str]) -> Result<(), Failed> {
    let runtime = tempfile::tempdir()?;
    let words = ["boot", "--timeout", "5"].iter().chain(arguments);
    let output = Vmm::new(words)
        .env("XDG_RUNTIME_DIR", runtime.path())
        .run()?;
    output
        .expect_status(2)?
        .expect_stderr(parts)?
        .expect_one_line()?;
    let left: Vec<_> = fs::read_dir(runtime.path())?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    if left
        .iter()
        .any(|path| fs::read_dir(path).is_ok_and(|mut dir| dir.next().is_some()))
    {
        return Err(format!("left behind: {left:?}").into());
    }
    Ok(())
}

fn doctor() -> Result<(), Failed> {
    let text = Vmm::new(["doctor"]).run()?;
    let json = Vmm::new(["doctor", "--json"]).run()?;
    let report: serde_json::Value = serde_json::from_str(&json.stdout)?;
    let findings = report["findings"].as_array().ok_or("no findings")?;
    for name in [
        "kvm",
        "userfaultfd",
        "ksm",
        "vsock",
        "runtime directory",
        "open files",
    ] {
        if !findings.iter().any(|finding| finding["name"] == name) || !text.stdout.contains(name) {
            return Err(format!("doctor says nothing of {name}: {report:#}").into());
        }
    }
    for finding in findings
        .iter()
        .filter(|finding| finding["verdict"] != "good")
    {
        if finding["costs"].is_null() || finding["remedy"].is_null() {
            return Err(format!("no cost or remedy: {finding:#}").into());
        }
    }
    let status = if report["usable"] == true { 0 } else { 1 };
    json.expect_status(status)?;
    text.expect_status(status)?;
    Ok(())
}

fn arguments() -> Result<(), Failed> {
    for (arguments, part) in [
        (&["boot", "--memory", "lots"][..], "give MiB as a number"),
        (&["boot", "--timeout", "0"], "give a duration above zero"),
        (
            &["boot", "--timeout", "10000000000000000000"],
            "at most 10 years",
        ),
        (&["boot", "--frobnicate"], "--frobnicate"),
        (&["boot", "--memroy", "1"], "exists: '--memory'"),
        (&["boot", "--drive", ",ro"], "give FILE, or FILE,ro"),
        (&["fly"], "fly"),
        (&["bot"], "exists: 'boot'"),
    ] {
        Vmm::new(arguments)
            .run()?
            .expect_status(2)?
            .expect_stderr(&[part])?
            .expect_one_line()?;
    }
    Ok(())
}

fn bad_kernels() -> Result<(), Failed> {
    refused(
        &["--kernel", "/nonexistent"],
        &["no guest kernel at /nonexistent"],
    )?;
    refused(&["--kernel", "/dev/null"], &["/dev/null is not a kernel"])?;
    refused(
        &["--kernel", "/bin/sh"],
        &["/bin/sh is not a kernel", "vmlinux or a bzImage"],
    )?;
    let text = tempfile::NamedTempFile::new()?;
    fs::write(text.path(), "#!/bin/sh\n".repeat(1000))?;
    refused(
        &["--kernel", &text.path().to_string_lossy()],
        &["is not a kernel"],
    )
}

fn truncated_kernel() -> Result<(), Failed> {
    let whole = tests::elf::kernel(&[0x90; 0x2000])?;
    let bytes = fs::read(whole.path())?;
    let cut = tempfile::NamedTempFile::new()?;
    fs::write(cut.path(), &bytes[..0x1000])?;
    refused(
        &["--kernel", &cut.path().to_string_lossy()],
        &["is truncated", "4096 bytes"],
    )
}

fn too_large_kernel() -> Result<(), Failed> {
    let kernel = tests::elf::kernel(&vec![0x90; 31 << 20])?;
    refused(
        &[
            "--memory",
            "32",
            "--kernel",
            &kernel.path().to_string_lossy(),
        ],
        &["does not fit", "give more --memory"],
    )
}

fn missing_image() -> Result<(), Failed> {
    let kernel = tests::elf::kernel(&[0xf4])?;
    let kernel = kernel.path().to_string_lossy();
    refused(
        &["--kernel", &kernel, "--image", "/nonexistent"],
        &["no guest image at /nonexistent"],
    )?;
    refused(
        &["--kernel", &kernel, "--image", "/"],
        &["the image / is neither a regular file"],
    )
}

fn cpus() -> Result<(), Failed> {
    let kernel = tests::elf::kernel(&[0xf4])?;
    let kernel = kernel.path().to_string_lossy();
    for cpus in ["0", "33", "1000"] {
        refused(
            &["--kernel", &kernel, "--cpus", cpus],
            &["CPUs: give --cpus a number from 1 to"],
        )?;
    }
    Ok(())
}

fn memory() -> Result<(), Failed> {
    let kernel = tests::elf::kernel(&[0xf4])?;
    let kernel = kernel.path().to_string_lossy();
    refused(
        &["--kernel", &kernel, "--memory", "31"],
        &["give --memory at least 32 MiB"],
    )?;
    refused(
        &["--kernel", &kernel, "--memory", "900T"],
        &["this host has", "give --memory less"],
    )?;
    Ok(())
}

/// Runs the shell command `script`, in which `$vmm boot` is to be refused with a line that holds `parts`.
fn refused_by_host(script: &str, parts: &[&str]) -> Result<(), Failed> {
    let kernel = tests::elf::kernel(&[0xf4])?;
    let directory = tempfile::Builder::new()
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .tempdir()?;
    let (vmm, copy) = (
        directory.path().join("vmm"),
        directory.path().join("kernel"),
    );
    fs::copy(tests::vmm_path(), &vmm)?;
    fs::copy(kernel.path(), &copy)?;
    fs::set_permissions(&copy, std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
    let output = std::process::Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .env(
            "boot",
            format!("{} boot --kernel {}", vmm.display(), copy.display()),
        )
        .output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    let said = parts.iter().all(|part| stderr.contains(part)) && stderr.lines().count() == 1;
    if output.status.code() != Some(2) || !said {
        return Err(format!("{output:?}").into());
    }
    Ok(())
}

fn no_kvm() -> Result<(), Failed> {
    refused_by_host(
        "mount -t tmpfs none /dev && exec $boot",
        &["no /dev/kvm", "modprobe"],
    )?;
    let empty = "mount -t tmpfs none /dev && mknod /dev/kvm c 10 254 && exec $boot";
    refused_by_host(empty, &["/dev/kvm"])
}

fn no_permission() -> Result<(), Failed> {
    let script = "mount -t tmpfs none /dev && mknod -m 600 /dev/kvm c 10 232 \
        && exec setpriv --reuid 65534 --clear-groups $boot";
    refused_by_host(script, &["no permission for /dev/kvm", "group kvm"])
}

fn full_output() -> Result<(), Failed> {
    let full = || fs::File::options().write(true).open("/dev/full");
    let vmm = || std::process::Command::new(tests::vmm_path());
    let output = vmm().arg("doctor").stdout(full()?).output()?;
    if output.status.code() != Some(125)
        || !String::from_utf8_lossy(&output.stderr).contains("standard output")
    {
        return Err(format!("{output:?}").into());
    }
    let status = vmm()
        .args(["boot", "--kernel", "/nonexistent"])
        .stderr(full()?)
        .status()?;
    if status.code() != Some(2) {
        return Err(format!("{status}").into());
    }
    Ok(())
}

/// What would block or copy for hours, were it opened or loaded.
fn pipes() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    let fifo = directory.path().join("fifo");
    std::process::Command::new("mkfifo").arg(&fifo).status()?;
    let fifo = fifo.to_string_lossy();
    refused(
        &["--kernel", &fifo],
        &["is not a kernel", "no regular file"],
    )?;
    let kernel = tests::elf::kernel(&[0xf4])?;
    let kernel = kernel.path().to_string_lossy();
    refused(
        &["--kernel", &kernel, "--image", &fifo],
        &["neither a regular file nor a block device"],
    )
}

/// What the file says counts, below the flags: told by which mistake is refused.
fn config_file() -> Result<(), Failed> {
    let kernel = tests::elf::kernel(&[0xf4])?;
    let directory = tempfile::tempdir()?;
    fs::copy(kernel.path(), directory.path().join("kernel"))?;
    fs::write(directory.path().join("disk"), [0; 4096])?;
    let file = directory.path().join("vm.toml");
    let path = file.to_string_lossy();
    let config = |text: &str| fs::write(&file, text);

    config("kernel = 'kernel'\nmemory = '31M'\n")?;
    refused(&["--config", &path], &["31 MiB of memory"])?;
    let flag = ["--config", &path, "--memory", "900T"];
    refused(&flag, &["give --memory less"])?;
    config("kernel = 'kernel'\nimage = 'nothing'\n")?;
    let missing = directory.path().join("nothing");
    refused(
        &["--config", &path],
        &["no guest image at", &missing.to_string_lossy()],
    )?;
    // The file's drive and the flag's, which are the same file twice.
    config("kernel = 'kernel'\n[[drives]]\npath = 'disk'\n[[drives]]\npath = 'disk'\n")?;
    refused(&["--config", &path], &["disk is given twice"])?;
    config("kernel = 'kernel'\n[[drives]]\npath = 'gone'\nread_only = true\n")?;
    refused(&["--config", &path], &["cannot open the image", "gone"])?;

    // JSON, and a VM that starts: the guest halts for good, so that its time runs out.
    let json = directory.path().join("vm.json");
    fs::write(
        &json,
        r#"{"kernel": "kernel", "memory": 64, "drives": [{"path": "disk"}], "timeout": 3600}"#,
    )?;
    let output = Vmm::new(
        ["boot", "--timeout", "1", "--config"]
            .map(AsRef::as_ref)
            .into_iter()
            .chain([json.as_os_str()]),
    )
    .run()?;
    output
        .expect_status(124)?
        .expect_stderr(&["timed out after"])?
        .expect_one_line()?;
    Ok(())
}

fn bad_config_files() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    for (name, text, message) in [
        ("a.toml", "cpus = 1\nmemory = \"2G\n", "a.toml:2:"),
        (
            "b.toml",
            "\ncpus = 'two'\n",
            "b.toml:2: cpus: invalid type: string \"two\", expected a number from 1 to 32",
        ),
        (
            "c.toml",
            "[[drives]]\npath = 'x'\nreadonly = true\n",
            "c.toml:3: unknown key drives[0].readonly: did you mean read_only?",
        ),
        (
            "d.json",
            "{\"cpus\": 2,\n \"memory\" 1}",
            "d.json:2:11: expected `:`",
        ),
        (
            "e.json",
            "{\n\"timeout\": \"soon\"}",
            "e.json:2: timeout: \"soon\" will not do: unknown unit",
        ),
        (
            "f",
            "{\n\n\"memroy\": 1}",
            "f:3: unknown key memroy: did you mean memory?",
        ),
    ] {
        let path = directory.path().join(name);
        fs::write(&path, text)?;
        refused(&["--config", &path.to_string_lossy()], &[message])?;
    }
    let missing = directory.path().join("missing.toml");
    refused(
        &["--config", &missing.to_string_lossy()],
        &[
            "cannot read the configuration",
            "missing.toml: No such file",
        ],
    )?;
    refused(
        &["--config", &directory.path().to_string_lossy()],
        &["is no regular file: give --config a TOML or JSON file"],
    )
}

/// A drive that another sandbox has, which is this test.
fn busy_drive() -> Result<(), Failed> {
    let kernel = tests::elf::kernel(&[0xf4])?;
    let kernel = kernel.path().to_string_lossy();
    let disk = tempfile::NamedTempFile::new()?;
    disk.as_file().set_len(1 << 20)?;
    let path = disk.path().to_string_lossy();
    let read_only = format!("{path},ro");
    let lock = |read_only| {
        let interface = DriveInterface::Block;
        let path = disk.path().to_owned();
        Drive::open(&DriveConfig {
            path,
            read_only,
            interface,
        })
    };
    let reader = lock(true)?;
    refused(
        &["--kernel", &kernel, "--drive", &path],
        &[&path, "is in use by another sandbox: stop that one"],
    )?;
    drop(reader);
    let _writer = lock(false)?;
    refused(
        &["--kernel", &kernel, "--drive", &read_only],
        &[&path, "in use by another sandbox, which may write to it"],
    )
}

/// The file system of the runtime directory has no room for a directory, a link, a lock or a socket.
fn full_disk() -> Result<(), Failed> {
    let directory = tempfile::tempdir()?;
    for inodes in 1..=5 {
        let script = format!(
            "mount -t tmpfs -o nr_inodes={inodes} none $XDG_RUNTIME_DIR && exec {} run --timeout 5 \
             --kernel /dev/null --image /dev/null -- true",
            tests::vmm_path().display()
        );
        let output = std::process::Command::new("unshare")
            .args(["--mount", "sh", "-c", &script])
            .env("XDG_RUNTIME_DIR", directory.path())
            .output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        let parts = ["No space left", "XDG_RUNTIME_DIR can name another place"];
        let path = directory.path().to_string_lossy();
        let said = parts.iter().all(|part| stderr.contains(part)) && stderr.contains(&*path);
        if output.status.code() != Some(2) || !said || stderr.lines().count() != 1 {
            return Err(format!("{inodes} inodes: {output:?}").into());
        }
    }
    Ok(())
}

fn completions_and_manual() -> Result<(), Failed> {
    for shell in ["bash", "zsh", "fish"] {
        let output = Vmm::new(["completions", shell]).run()?;
        output.expect_status(0)?.expect_no_stderr()?;
        for word in ["doctor", "image-as", "completions"] {
            if !output.stdout.contains(word) {
                return Err(format!("{shell}: no {word}").into());
            }
        }
    }
    let directory = tempfile::tempdir()?;
    let pages = directory.path().join("new");
    let words = ["man".as_ref(), "--output".as_ref(), pages.as_os_str()];
    Vmm::new(words).run()?.expect_status(0)?;
    let page = fs::read_to_string(pages.join("vmm-run.1"))?;
    let whole = Vmm::new(["man"]).run()?;
    if !page.contains("image\\-as") || !whole.stdout.contains(&page) {
        return Err(format!("a page lacks its options: {page}").into());
    }
    Vmm::new(["man", "--output", "/dev/null/pages"])
        .run()?
        .expect_status(2)?
        .expect_stderr(&["/dev/null/pages", "--output"])?
        .expect_one_line()?;
    Ok(())
}
