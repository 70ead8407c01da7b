//! A command line that makes no sense, in one line: clap's words, its suggestions, and where the help is.

use clap::error::ErrorKind;

/// One line about `error`; none where clap has more to say than a mistake, such as the help that was asked for.
pub fn one_line(error: &clap::Error) -> Option<String> {
    use ErrorKind::{DisplayHelp, DisplayHelpOnMissingArgumentOrSubcommand, DisplayVersion};
    if let DisplayHelp | DisplayHelpOnMissingArgumentOrSubcommand | DisplayVersion = error.kind() {
        return None;
    }
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let mut line = String::new();
    for part in text.lines().map(str::trim).filter(|part| !part.is_empty()) {
        if part.starts_with("Usage: ") || part.starts_with("For more information") {
            break;
        }
        let separator = match (line.is_empty(), part.strip_prefix("tip: ")) {
            (true, _) => "",
            (false, Some(_)) => "; ",
            (false, None) => " ",
        };
        line += separator;
        line += part.strip_prefix("tip: ").unwrap_or(part);
    }
    Some(format!("{line}; --help says more"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::Cli;
    use super::*;

    #[test]
    fn mistakes_are_one_line_with_a_suggestion() {
        for (words, expected) in [
            (
                &["vmm", "dokter"][..],
                "unrecognized subcommand 'dokter'; a similar subcommand exists: 'doctor'; --help says more",
            ),
            (
                &["vmm", "boot", "--memroy", "1"],
                "unexpected argument '--memroy' found; a similar argument exists: '--memory'; --help says more",
            ),
            (
                &["vmm", "boot", "--image-as", "pmen"],
                "invalid value 'pmen' for '--image-as <DEVICE>' [possible values: pmem, block]; a similar value exists: 'pmem'; --help says more",
            ),
            (
                &["vmm", "boot", "--cpus"],
                "a value is required for '--cpus <N>' but none was supplied; --help says more",
            ),
            (
                &["vmm", "completions"],
                "the following required arguments were not provided: <SHELL>; --help says more",
            ),
        ] {
            let error = Cli::try_parse_from(words).unwrap_err();
            assert_eq!(one_line(&error).as_deref(), Some(expected));
        }
    }

    #[test]
    fn help_stays_as_it_is() {
        for words in [&["vmm"][..], &["vmm", "--help"], &["vmm", "--version"]] {
            let error = Cli::try_parse_from(words).unwrap_err();
            assert_eq!(one_line(&error), None);
        }
    }
}
