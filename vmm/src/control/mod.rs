//! The API of a sandbox: HTTP/1.1 with JSON on the Unix socket `api.sock` in its directory.
//!
//! One request per connection. `openapi.json` describes it, and is served as well. `types.rs` has what is sent,
//! `http.rs` reads and writes messages, `server.rs` serves, `routes.rs` and `exec.rs` carry out, `client.rs` asks.

mod branch;
pub mod client;
pub mod exec;
mod explore;
mod guest_branch;
pub mod http;
pub mod rollback;
pub mod routes;
pub mod server;
pub mod snapshot;
pub mod types;
