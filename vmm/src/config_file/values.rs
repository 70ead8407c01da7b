//! Values that a file may give in more than one form, and what is said of those that it may not.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;
use std::time::Duration;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Unexpected, Visitor};

use crate::config::CPUS_MAX;
use crate::sizes::{duration, memory_mib};
use crate::warm::WarmRuntime;

/// A table, and nothing else: derived code would take a sequence as well, its fields by their places.
pub(super) struct Table<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Table<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Fields<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("keys and values")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }
        from.deserialize_map(Fields(PhantomData)).map(Self)
    }
}

/// One table.
pub(super) fn table<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    from: D,
) -> Result<T, D::Error> {
    Table::deserialize(from).map(|Table(value)| value)
}

/// A sequence of tables.
pub(super) fn tables<'de, T: Deserialize<'de>, D: Deserializer<'de>>(
    from: D,
) -> Result<Vec<T>, D::Error> {
    let tables = Vec::<Table<T>>::deserialize(from)?;
    Ok(tables.into_iter().map(|Table(value)| value).collect())
}

/// A number or text, which `parse` understands.
struct NumberOrText<T> {
    expected: &'static str,
    parse: fn(&str) -> Result<T, String>,
}

impl<T> NumberOrText<T> {
    fn of<E: Error>(&self, text: &str) -> Result<T, E> {
        (self.parse)(text).map_err(|reason| {
            // The command line's words: they begin with what to do.
            E::custom(format_args!("{text:?} will not do: {reason}"))
        })
    }
}

impl<T> Visitor<'_> for NumberOrText<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
        self.of(&number.to_string())
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
        match u64::try_from(number) {
            Ok(number) => self.visit_u64(number),
            Err(_) => Err(E::invalid_value(Unexpected::Signed(number), &self)),
        }
    }

    fn visit_f64<E: Error>(self, number: f64) -> Result<T, E> {
        match self.of::<E>(&number.to_string()) {
            Ok(value) => Ok(value),
            Err(_) => Err(E::invalid_value(Unexpected::Float(number), &self)),
        }
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        self.of(text)
    }
}

/// Memory in MiB.
pub(super) fn memory<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let visitor = NumberOrText {
        expected: "MiB as a number, or text with M, G or T, such as \"2G\"",
        parse: memory_mib,
    };
    from.deserialize_any(visitor).map(Some)
}

/// How many sandboxes.
pub(super) fn sandboxes<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
    let visitor = NumberOrText {
        expected: "a number of sandboxes",
        parse: |text| {
            text.parse()
                .map_err(|_| format!("give a number up to {}", u32::MAX))
        },
    };
    from.deserialize_any(visitor).map(Some)
}

/// A time span.
pub(super) fn timeout<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
    let visitor = NumberOrText {
        expected: "seconds as a number above zero, or text with ms, s, m, h or d, such as \"5m\"",
        parse: duration,
    };
    from.deserialize_any(visitor).map(Some)
}

/// How many processors.
pub(super) fn cpus<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u32>, D::Error> {
    struct Cpus;
    impl Visitor<'_> for Cpus {
        type Value = u32;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "a number from 1 to {CPUS_MAX}")
        }

        fn visit_u64<E: Error>(self, number: u64) -> Result<u32, E> {
            match u32::try_from(number) {
                Ok(cpus) if (1..=CPUS_MAX).contains(&cpus) => Ok(cpus),
                _ => Err(E::invalid_value(Unexpected::Unsigned(number), &self)),
            }
        }

        fn visit_i64<E: Error>(self, number: i64) -> Result<u32, E> {
            match u64::try_from(number) {
                Ok(number) => self.visit_u64(number),
                Err(_) => Err(E::invalid_value(Unexpected::Signed(number), &self)),
            }
        }
    }
    from.deserialize_any(Cpus).map(Some)
}

/// An interpreter.
pub(super) fn warm<'de, D: Deserializer<'de>>(from: D) -> Result<Option<WarmRuntime>, D::Error> {
    let text = String::deserialize(from)?;
    let parsed = text.parse();
    let refused = |reason| D::Error::custom(format_args!("{text:?} will not do: {reason}"));
    parsed.map(Some).map_err(refused)
}

/// A path, which must not be empty: joined to a directory it would be that directory.
pub(super) fn path<'de, D: Deserializer<'de>>(from: D) -> Result<Option<PathBuf>, D::Error> {
    required_path(from).map(Some)
}

/// As [`path`], where there must be one.
pub(super) fn required_path<'de, D: Deserializer<'de>>(from: D) -> Result<PathBuf, D::Error> {
    let text = String::deserialize(from)?;
    if text.is_empty() {
        let expected = "the path of a file";
        return Err(D::Error::invalid_value(Unexpected::Str(""), &expected));
    }
    Ok(text.into())
}

/// Variables of an environment.
pub(super) fn env<'de, D: Deserializer<'de>>(
    from: D,
) -> Result<BTreeMap<String, String>, D::Error> {
    let variables = BTreeMap::<String, String>::deserialize(from)?;
    for (name, value) in &variables {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(D::Error::custom(format_args!(
                "{name:?} cannot be a variable: a name is not empty and has no =, and neither name nor value has NUL"
            )));
        }
    }
    Ok(variables)
}
