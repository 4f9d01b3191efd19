//! `TokioStream` and its halves with code that uses tokio's traits, on both ends of a connection,
//! for each backend and each placement of the server's handlers.
//!
//! On a host without io_uring its cases are skipped with a printed reason; with
//! `REQUIRE_ALL_BACKENDS=1` they fail.

mod codec;
mod direct;
mod harness;
mod http;
mod hyper;
mod io;

macro_rules! mount {
    ($($name:ident: $backend:expr, $placement:expr;)+) => {$(
        mod $name {
            use ringpoll::{Backend, Placement};

            use crate::harness::Mount;

            const MOUNT: Mount = Mount { backend: $backend, placement: $placement };
            crate::io::cases!(tests, MOUNT);
            crate::codec::cases!(tests, MOUNT);
            crate::http::cases!(tests, MOUNT);
            crate::hyper::cases!(tests, MOUNT);
            crate::direct::cases!(tests, MOUNT);
        }
    )+};
}

macro_rules! tests {
    ($mount:ident, $group:ident: $($name:ident)*) => {
        mod $group {
            $(
                #[test]
                fn $name() {
                    crate::harness::run(super::$mount, stringify!($name), crate::$group::$name);
                }
            )*
        }
    };
}

mount! {
    epoll_inline: Backend::Epoll, Placement::Inline;
    epoll_pool: Backend::Epoll, Placement::Pool { workers: 2 };
    epoll_tokio: Backend::Epoll, Placement::Tokio;
    uring_inline: Backend::Uring, Placement::Inline;
    uring_pool: Backend::Uring, Placement::Pool { workers: 2 };
    uring_tokio: Backend::Uring, Placement::Tokio;
}
