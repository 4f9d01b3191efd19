//! Load on HTTP servers: the programs wrk and h2load (`tools`), and large bodies that this process
//! sends or reads itself (`transfer`).
//!
//! A tool counts from its first request on, without a warm-up. The observer is told before it
//! starts and after it has ended, so the server's CPU time is that of all requests.

mod tools;
mod transfer;

use std::net::SocketAddr;
use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::error::Result;
use crate::load::windows::Clean;
use crate::load::{Observer, Outcome, histogram};

/// What is asked of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum HttpLoad {
    /// A short text, over HTTP/1.1.
    Text,
    /// A short JSON document, over HTTP/1.1.
    Json,
    /// A short text, over HTTP/2.
    TextHttp2,
    /// A unary call of gRPC.
    Unary,
    /// A streamed answer of 1 GiB.
    Download,
    /// A request with a body of 1 GiB.
    Upload,
}

impl HttpLoad {
    pub(crate) const ALL: [HttpLoad; 6] = [
        HttpLoad::Text,
        HttpLoad::Json,
        HttpLoad::TextHttp2,
        HttpLoad::Unary,
        HttpLoad::Download,
        HttpLoad::Upload,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            HttpLoad::Text => "GET /",
            HttpLoad::Json => "GET /json",
            HttpLoad::TextHttp2 => "HTTP/2 GET /",
            HttpLoad::Unary => "gRPC unary",
            HttpLoad::Download => "GET /big/1024, in MiB",
            HttpLoad::Upload => "POST /upload of 1 GiB, in MiB",
        }
    }

    /// What is sent, for a reader of the figures.
    pub(crate) fn traffic(self) -> &'static str {
        match self {
            HttpLoad::Text | HttpLoad::Json => "64 connections, one request in flight on each; wrk",
            HttpLoad::TextHttp2 => "64 connections, 8 requests in flight on each; h2load",
            HttpLoad::Unary => "64 connections, 8 calls in flight on each; h2load",
            HttpLoad::Download | HttpLoad::Upload => {
                "one transfer of 1 GiB at a time; a request is a MiB, a latency is that of a \
                 transfer"
            }
        }
    }

    /// The example program that answers.
    pub(crate) fn program(self) -> &'static str {
        match self {
            HttpLoad::Unary => "grpc_greeter",
            _ => "axum_app",
        }
    }

    /// The program that sends; `None`: this one.
    pub(crate) fn tool(self) -> Option<&'static str> {
        match self {
            HttpLoad::Text | HttpLoad::Json => Some(tools::WRK),
            HttpLoad::TextHttp2 | HttpLoad::Unary => Some(tools::H2LOAD),
            HttpLoad::Download | HttpLoad::Upload => None,
        }
    }

    /// Connections, and requests in flight on each.
    pub(crate) fn connections(self) -> (u32, u32) {
        match self {
            HttpLoad::Text | HttpLoad::Json => (CONNECTIONS, 1),
            HttpLoad::TextHttp2 | HttpLoad::Unary => (CONNECTIONS, STREAMS),
            HttpLoad::Download | HttpLoad::Upload => (1, 1),
        }
    }

    /// Loads the server at `addr`. The tools take whole seconds, so `duration` is rounded up.
    pub(crate) fn run(
        self,
        addr: SocketAddr,
        duration: Duration,
        timeout: Duration,
        observer: &mut dyn Observer,
    ) -> Result<Outcome> {
        match self {
            HttpLoad::Text => tools::wrk(addr, "/", duration, observer),
            HttpLoad::Json => tools::wrk(addr, "/json", duration, observer),
            HttpLoad::TextHttp2 => tools::h2load(addr, "/", duration, observer),
            HttpLoad::Unary => tools::unary(addr, duration, observer),
            HttpLoad::Download => transfer::repeat(TRANSFER_MIB, duration, observer, || {
                transfer::download(addr, TRANSFER_MIB, timeout)
            }),
            HttpLoad::Upload => transfer::repeat(TRANSFER_MIB, duration, observer, || {
                transfer::upload(addr, TRANSFER_MIB, timeout)
            }),
        }
    }
}

/// What a load without errors comes to. No windows are kept, so none is known to be clean.
fn outcome(
    requests: u64,
    bytes: u64,
    elapsed: Duration,
    latency: Histogram<u64>,
) -> Result<Outcome> {
    let clean = Clean {
        windows: 0,
        windows_left_out: 0,
        latency: histogram()?,
        cheap_latency: histogram()?,
    };
    Ok(Outcome {
        requests,
        requests_ever: requests,
        errors: 0,
        first_error: None,
        elapsed,
        bytes,
        cheap_latency: latency.clone(),
        latency,
        clean,
    })
}

const CONNECTIONS: u32 = 64;
/// Of each connection of HTTP/2.
const STREAMS: u32 = 8;
const TRANSFER_MIB: u64 = 1024;
