//! Trees of files, to and from a client.

use std::io::{self, BufWriter};

use guest_agent::proto::{ErrorCode, ReadTree, WriteTree};
use guest_agent::tree::{self, TreeError};

use super::{failed, path};
use crate::failure::Failure;

fn explain(error: TreeError) -> Failure {
    match &error {
        TreeError::Io { path, source } => failed(path, source),
        TreeError::LeadsOut { .. } | TreeError::TooDeep { .. } => {
            Failure::new(ErrorCode::InvalidArgument, error.to_string())
        }
    }
}

/// Carries out `ReadTree`.
pub fn read(request: &ReadTree) -> Result<(), Failure> {
    let out = BufWriter::with_capacity(64 * 1024, io::stdout().lock());
    tree::pack(path(&request.path), out).map_err(explain)
}

/// Carries out `WriteTree`.
pub fn write(request: &WriteTree) -> Result<(), Failure> {
    tree::unpack(io::stdin().lock(), path(&request.path)).map_err(explain)
}
