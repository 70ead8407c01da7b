//! Sizes and durations as people write them.

use std::time::Duration;

/// Ten years: more than anybody waits, and far from where times overflow.
const DURATION_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Memory in MiB: `512`, `512M`, `512MiB`, `2G`, `2GiB`.
pub fn memory_mib(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let factor = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "m" | "mib" => 1,
        "g" | "gib" => 1 << 10,
        "t" | "tib" => 1 << 20,
        unit => {
            return Err(format!(
                "unknown unit {unit:?}: give MiB as a number, or with M, G or T"
            ));
        }
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "give MiB as a number, or with M, G or T".to_owned())?;
    number
        .checked_mul(factor)
        .ok_or_else(|| "this is more than any host has".to_owned())
}

/// A duration: `30` (seconds), `1.5s`, `200ms`, `5m`, `1h`, `7d`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit() && c != '.');
    let factor = match &text[digits.len()..] {
        "" | "s" => 1.0,
        "ms" => 1e-3,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        unit => {
            return Err(format!(
                "unknown unit {unit:?}: give seconds, or a number with ms, s, m, h or d"
            ));
        }
    };
    let number: f64 = digits
        .parse()
        .map_err(|_| "give seconds, or a number with ms, s, m, h or d".to_owned())?;
    match Duration::try_from_secs_f64(number * factor) {
        Ok(duration) if duration.is_zero() => Err("give a duration above zero".to_owned()),
        Ok(duration) if duration <= DURATION_MAX => Ok(duration),
        Err(_) if number < 0.0 || number.is_nan() => Err("give a duration above zero".to_owned()),
        _ => Err("give a duration of at most 10 years, or none at all".to_owned()),
    }
}

/// A number of bytes in its largest unit, as people say it.
pub fn bytes(bytes: u64) -> String {
    let mut unit = 1;
    for (name, next) in [("B", "K"), ("K", "M"), ("M", "G"), ("G", "T")] {
        if bytes / unit < 1024 || next == "T" {
            let tenths = bytes % unit * 10 / unit;
            let whole = bytes / unit;
            return if unit == 1 || whole >= 100 {
                format!("{whole}{name}")
            } else {
                format!("{whole}.{tenths}{name}")
            };
        }
        unit <<= 10;
    }
    unreachable!("the last unit takes all")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_mebibytes() {
        for (text, mib) in [
            ("128", 128),
            ("128M", 128),
            ("64mib", 64),
            ("2G", 2048),
            ("1TiB", 1 << 20),
        ] {
            assert_eq!(memory_mib(text), Ok(mib), "{text}");
        }
        for text in ["", "M", "1K", "-1", "1.5G", "99999999999999T", "x12"] {
            assert!(memory_mib(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_are_seconds() {
        for (text, millis) in [
            ("1", 1000),
            ("1.5s", 1500),
            ("200ms", 200),
            ("5m", 300_000),
            ("1h", 3_600_000),
            ("7d", 604_800_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "s", "0", "-1", "1w", "1e400", "99999999999", "."] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
