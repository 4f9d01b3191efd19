//! `sqpoll`: rings whose submission queues kernel threads poll, so that a busy poller makes no
//! system calls.
//!
//! Only the backend `sqpoll` and its presets use this folder. The poller then receives through a
//! ring of this kind (but not with `sqpoll-config2`), and every send goes through one: any thread
//! pushes its send to a submission queue, and the poller takes the completion.
//!
//! The files, in reading order:
//! - `engine.rs`: which rings a poller has, and which kernel threads poll them;
//! - `polled.rs`: a ring that a kernel thread polls, its submission queue, which any thread may
//!   use, and its completion queue, which the poller owns;
//! - `send_rings.rs`: starting a send from any thread;
//! - `shared_sends.rs`: the poller's part of such sends;
//! - `tail.rs`: when a producer must wake the kernel thread;
//! - `kernel_threads.rs`: identity, niceness and CPU time of the kernel threads.

mod engine;
mod kernel_threads;
pub(super) mod polled;
mod send_rings;
mod shared_sends;
mod tail;

pub(crate) use engine::Engine;
pub(crate) use send_rings::SendRings;
pub(super) use shared_sends::SharedSends;
