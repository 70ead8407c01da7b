//! What the whole-VM tests share.
