//! The cache of boots, as its user sees it.

use std::fs;
use std::path::Path;
use std::process::Command;

use libtest_mimic::Failed;
use serde_json::Value;
use tests::sandboxes::Host;
use tests::{Output, cache_home};

/// A host with a cache of its own.
struct Place {
    host: Host,
    cache: std::path::PathBuf,
}

impl Place {
    fn vmm(&self, words: &[&str]) -> Result<Output, Failed> {
        self.host
            .vmm(words)
            .env("XDG_CACHE_HOME", &self.cache)
            .run()
    }

    /// What a run with these flags has done, by its timings; it prints what it should.
    fn run(&self, flags: &[&str]) -> Result<String, Failed> {
        let words = [&["run", "--timings"], flags, &["--", "echo", "done"]].concat();
        let output = self.vmm(&words)?;
        output.expect_status(0)?.expect_stdout("done\n")?;
        Ok(output.stderr)
    }

    fn expect(&self, flags: &[&str], way: Way) -> Result<String, Failed> {
        let said = self.run(flags)?;
        let found = match (said.contains("guest told"), said.contains("boot kept")) {
            (true, false) => Way::Restored,
            (false, true) => Way::BootedAndKept,
            (false, false) => Way::Booted,
            (true, true) => return Err(said.into()),
        };
        if found == way {
            return Ok(said);
        }
        Err(format!("{flags:?}: {found:?}, not {way:?}: {said}").into())
    }

    /// The directories of the kept.
    fn kept(&self) -> Result<Vec<String>, Failed> {
        let output = self.vmm(&["cache", "ls", "--json"])?;
        let listed: Value = serde_json::from_str(&output.expect_status(0)?.stdout)?;
        let ids = listed.as_array().into_iter().flatten();
        Ok(ids
            .filter_map(|one| Some(one["id"].as_str()?.to_owned()))
            .collect())
    }
}

#[derive(Debug, PartialEq)]
enum Way {
    Restored,
    Booted,
    BootedAndKept,
}

fn copy_tree(from: &Path, to: &Path) -> Result<(), Failed> {
    let copied = Command::new("cp").arg("-r").args([from, to]).status()?;
    if copied.success() {
        return Ok(());
    }
    Err(format!("cp: {copied}").into())
}

/// A boot is kept and used; what was kept and cannot be used is told, and does no harm.
pub fn runs() -> Result<(), Failed> {
    let host = Host::new()?;
    // The tests' cache has this guest from here on; what happens to the copy is nobody else's business.
    host.ok(&["run", "--", "true"])?;
    let cache = host.path().join("cache");
    copy_tree(&cache_home(), &cache)?;
    let place = Place { host, cache };
    let before = place.kept()?;
    place.expect(&[], Way::Restored)?;
    place.expect(&["--cold"], Way::Booted)?;
    if place.kept()? != before {
        return Err("a run without the cache has changed it".into());
    }
    // What is on a disk that guests write to is another every time.
    let disk = place.host.path().join("disk");
    fs::write(&disk, [0; 4096])?;
    place.expect(&["--drive", &disk.to_string_lossy()], Way::Booted)?;
    place.expect(&["--memory", "144"], Way::BootedAndKept)?;
    place.expect(&["--memory", "144"], Way::Restored)?;
    let mut kept = place.kept()?;
    kept.retain(|id| !before.contains(id));
    let [kept] = &kept[..] else {
        return Err(format!("not one new boot: {kept:?}").into());
    };

    let layer = place
        .cache
        .join("bough/boots")
        .join(kept)
        .join("memory.layer");
    let half = fs::metadata(&layer)?.len() / 2;
    fs::File::options()
        .write(true)
        .open(&layer)?
        .set_len(half)?;
    let said = place.expect(&["--memory", "144"], Way::BootedAndKept)?;
    if !said.contains("a cached boot cannot be used") || !said.contains("memory.layer") {
        return Err(format!("no warning: {said}").into());
    }
    place.expect(&["--memory", "144"], Way::Restored)?;

    // It can go while a guest works that came from it: nothing but a warning of its user's own making stands in the way.
    place
        .vmm(&["start", "one", "--memory", "144"])?
        .expect_status(0)?;
    place
        .vmm(&["cache", "gc", "--max-size", "0"])?
        .expect_status(0)?;
    let left = place.kept()?;
    place.vmm(&["rm", "--force", "one"])?.expect_status(0)?;
    place
        .vmm(&["cache", "gc", "--max-size", "0"])?
        .expect_status(0)?;
    if left.len() != 1 || !place.kept()?.is_empty() {
        return Err(format!("while in use: {left:?}; afterwards: {:?}", place.kept()?).into());
    }
    Ok(())
}
