//! Bad input: each a message of one line that names the thing and the remedy, exit status 2, nothing left behind.

use std::fs;
use std::process::ExitCode;

use libtest_mimic::Failed;
use tests::Needs::{Kvm, Nothing, Root};
use tests::{Vmm, test};

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
        (&["fly"], "fly"),
    ] {
        Vmm::new(arguments)
            .run()?
            .expect_status(2)?
            .expect_stderr(&[part])?;
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
