//! The protocols of RPC frameworks, beside the plain frames of `wire`: one method that returns the
//! payload it is called with.
//!
//! `grpc` and `thrift` hold what their servers and the load generator share: the messages and the
//! method. Written by hand, because a build shall generate no code for them. `on_ringpoll` serves
//! them on connections of ringpoll.

pub(crate) mod grpc;
pub(crate) mod on_ringpoll;
pub(crate) mod thrift;

use std::fmt;

use clap::ValueEnum;

/// How a client and a server talk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Protocol {
    /// A length and a payload
    #[default]
    Frames,
    /// A unary method of gRPC on HTTP/2
    Grpc,
    /// A method of Thrift: framed, the binary protocol
    Thrift,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Protocol::Frames => "frames",
            Protocol::Grpc => "grpc",
            Protocol::Thrift => "thrift",
        })
    }
}
