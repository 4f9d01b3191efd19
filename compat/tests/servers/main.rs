//! axum, tonic and rustls on ringpoll, with clients that do not use ringpoll, and with its own.
//!
//! Each case runs on each backend. On a host without io_uring its cases are skipped with a printed
//! reason; with `REQUIRE_ALL_BACKENDS=1` they fail.

mod apps;
mod clients;
mod ends;
mod faults;
mod frames;
#[path = "../../examples/greeter/mod.rs"]
mod greeter;
mod grpc;
mod harness;
mod http1;
mod http2;
mod probe;
mod tls;
mod websocket;

macro_rules! mount {
    ($($name:ident: $backend:expr;)+) => {$(
        mod $name {
            use ringpoll::Backend;

            const BACKEND: Backend = $backend;
            crate::apps::cases!(tests, BACKEND);
            crate::ends::cases!(tests, BACKEND);
            crate::faults::cases!(tests, BACKEND);
            crate::frames::cases!(tests, BACKEND);
            crate::grpc::cases!(tests, BACKEND);
            crate::http1::cases!(tests, BACKEND);
            crate::http2::cases!(tests, BACKEND);
            crate::tls::cases!(tests, BACKEND);
            crate::websocket::cases!(tests, BACKEND);
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
