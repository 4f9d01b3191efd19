//! The bridges to futures, tower and metrics, on both ends of a connection.
//!
//! Each case runs on each backend. On a host without io_uring its cases are skipped with a printed
//! reason; with `REQUIRE_ALL_BACKENDS=1` they fail.

mod client;
mod futures;
mod harness;
mod layers;
mod metrics;
mod recorder;
mod serving;

macro_rules! mount {
    ($($name:ident: $backend:expr;)+) => {$(
        mod $name {
            use ringpoll::Backend;

            const BACKEND: Backend = $backend;
            crate::futures::cases!(tests, BACKEND);
            crate::serving::cases!(tests, BACKEND);
            crate::client::cases!(tests, BACKEND);
            crate::layers::cases!(tests, BACKEND);
            crate::metrics::cases!(tests, BACKEND);
        }
    )+};
}

macro_rules! tests {
    ($backend:ident, $group:ident: $($name:ident)*) => {
        mod $group {
            $(
                #[test]
                fn $name() {
                    crate::harness::run(super::$backend, stringify!($name), crate::$group::$name);
                }
            )*
        }
    };
}

mount! {
    epoll: Backend::Epoll;
    uring: Backend::Uring;
}
