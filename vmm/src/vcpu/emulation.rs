//! Names for the instructions that a software KVM cannot emulate at ring 0.
//!
//! Only those that a Linux kernel is known to meet; for any other the bytes alone are reported.

/// An instruction's encoding: its opcode bytes, and the ModRM extension (`/n`) if that tells it apart.
struct Encoding(&'static [u8], Option<u8>, &'static str);

const KNOWN: &[Encoding] = &[
    Encoding(&[0xcc], None, "int3"),
    Encoding(&[0x9b], None, "fwait"),
    Encoding(&[0xdb, 0xe2], None, "fnclex"),
    Encoding(&[0x0f, 0x77], None, "emms"),
    Encoding(&[0x0f, 0x01, 0xca], None, "clac"),
    Encoding(&[0x0f, 0x01, 0xcb], None, "stac"),
    Encoding(&[0x0f, 0x01, 0xc1], None, "vmcall"),
    Encoding(&[0x0f, 0x01, 0xd9], None, "vmmcall"),
    Encoding(&[0x0f, 0xb8], None, "popcnt"),
    Encoding(&[0x0f, 0xae], Some(0), "rdfsbase or fxsave"),
    Encoding(&[0x0f, 0xae], Some(1), "rdgsbase or fxrstor"),
    Encoding(&[0x0f, 0xae], Some(2), "wrfsbase or ldmxcsr"),
    Encoding(&[0x0f, 0xae], Some(3), "wrgsbase or stmxcsr"),
    Encoding(&[0x0f, 0xae], Some(4), "xsave"),
    Encoding(&[0x0f, 0xae], Some(5), "xrstor"),
    Encoding(&[0x0f, 0xae], Some(6), "xsaveopt"),
    Encoding(&[0x0f, 0xc7], Some(1), "cmpxchg16b"),
    Encoding(&[0x0f, 0xc7], Some(3), "xrstors"),
    Encoding(&[0x0f, 0xc7], Some(4), "xsavec"),
    Encoding(&[0x0f, 0xc7], Some(5), "xsaves"),
    Encoding(&[0x0f, 0xc7], Some(7), "rdpid"),
];

/// The mnemonic of the instruction that `bytes` begin with, prefixes skipped, if it is one of those known to fail.
pub fn instruction_name(bytes: &[u8]) -> Option<&'static str> {
    let is_prefix = |byte: &u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3);
    let start = bytes.iter().position(|byte| !is_prefix(byte))?;
    let opcode = &bytes[start..];
    KNOWN.iter().find_map(|Encoding(prefix, extension, name)| {
        let rest = opcode.strip_prefix(*prefix)?;
        let matches = match extension {
            None => true,
            Some(n) => rest.first().is_some_and(|modrm| (modrm >> 3) & 7 == *n),
        };
        matches.then_some(*name)
    })
}

#[cfg(test)]
mod tests {
    use super::instruction_name;

    #[test]
    fn known_instructions_are_named() {
        for (bytes, name) in [
            (&[0xcc][..], "int3"),
            (&[0xf3, 0x48, 0x0f, 0xb8, 0xc7], "popcnt"),
            (&[0xf0, 0x48, 0x0f, 0xc7, 0x4d, 0x00], "cmpxchg16b"),
            (&[0x48, 0x0f, 0xae, 0x27], "xsave"),
            (&[0xf3, 0x0f, 0xae, 0xd0], "wrfsbase or ldmxcsr"),
        ] {
            assert_eq!(instruction_name(bytes), Some(name));
        }
    }

    #[test]
    fn others_are_not() {
        for bytes in [&[][..], &[0xf0], &[0x90], &[0x0f], &[0x0f, 0xae]] {
            assert_eq!(instruction_name(bytes), None);
        }
    }
}
