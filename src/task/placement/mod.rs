//! Where the handlers of a server run: on its pollers, on worker threads, or on a tokio runtime.
//!
//! - `executor.rs` puts the chosen [`Placement`](crate::Placement) into effect.
//! - `policy.rs` decides between pollers and workers, and how threads share a CPU.
//! - `measurement.rs` measures how long handlers run. The policy decides by these figures.
//! - `relief.rs` moves work away from a poller while a handler blocks that poller.

mod executor;
mod measurement;
mod policy;
mod relief;

pub(crate) use executor::{Executor, RuntimeContext};
pub(crate) use measurement::{Host, Spent, leave_out, next_part};
pub use policy::PlacementStats;
pub(super) use policy::{Policy, Timed};
pub(crate) use relief::{Used, Watched};
