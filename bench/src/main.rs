//! The benchmark program of `ringpoll`.

fn main() {}
