//! Bytes in JSON: base64 text. For fields as `#[serde(with = "snapshot_fmt::bytes")]`.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::{Deserializer, Error, Visitor};
use serde::ser::Serializer;

/// Writes bytes as base64 with padding (RFC 4648, section 4).
pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&STANDARD.encode(bytes))
}

/// Reads what [`serialize`] wrote. Other alphabets, line ends and missing padding are errors.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    deserializer.deserialize_str(Base64)
}

/// Takes the text where it lies: no copy of a large field.
struct Base64;

impl Visitor<'_> for Base64 {
    type Value = Vec<u8>;

    fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("base64 text")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Vec<u8>, E> {
        STANDARD.decode(text).map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Blob {
        #[serde(with = "super")]
        data: Vec<u8>,
    }

    #[test]
    fn bytes_are_base64() {
        let blob = Blob {
            data: vec![0, 255, 62, 63],
        };
        let json = serde_json::to_string(&blob).unwrap();
        assert_eq!(json, r#"{"data":"AP8+Pw=="}"#);
        assert_eq!(serde_json::from_str::<Blob>(&json).unwrap(), blob);
    }

    #[test]
    fn what_is_not_base64_is_refused() {
        for data in ["\"AP8+Pw\"", "\"AP8-Pw==\"", "[0]", "\"A\""] {
            assert!(serde_json::from_str::<Blob>(&format!("{{\"data\":{data}}}")).is_err());
        }
    }
}
