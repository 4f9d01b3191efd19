//! The first poll of a future, in memory that the next one uses again.
//!
//! Most handlers end in their first poll, and each has a future as large as all it keeps. So a
//! thread keeps the memory of the last one that ended; allocating costs most runs nothing.

use std::any::Any;
use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::{Run, Tried, Wait};
use crate::user_code;

/// Puts `future` in its place and has `attempt` poll it, which tells what it waits for if it is not
/// done. Then what is left of it is returned as well.
#[inline]
pub(crate) fn poll_first<F, T>(
    future: F,
    attempt: impl FnOnce(Pin<&mut F>) -> Tried<T>,
) -> Result<T, (Run, Wait)>
where
    F: Future<Output = ()> + Send + 'static,
{
    let kept = SPARE.with(Cell::take).and_then(|spare| spare.downcast::<Spare<F>>().ok());
    let mut spare = kept.unwrap_or_else(|| Box::new(Spare(Box::pin(Place { future: None }))));
    let mut place = spare.0.as_mut().project().future;
    place.set(Some(future));
    let tried = place.as_mut().as_pin_mut().map(attempt).expect("it was just put there");
    match tried {
        Tried::Done(done) => {
            place.set(None);
            SPARE.with(|place| place.set(Some(spare)));
            Ok(done)
        }
        Tried::Waits(wait) => Err((spare.0, wait)),
    }
}

thread_local! {
    /// A `Spare` of the last type that ended here.
    static SPARE: Cell<Option<Box<dyn Any>>> = const { Cell::new(None) };
}

struct Spare<F>(Pin<Box<Place<F>>>);

pin_project_lite::pin_project! {
    /// A future, dropped as code of the user's: a panic of its destructor goes no further. One that
    /// reached `async_task` would end the process.
    pub(super) struct Place<F> {
        #[pin]
        future: Option<F>,
    }

    impl<F> PinnedDrop for Place<F> {
        fn drop(this: Pin<&mut Self>) {
            user_code::call("destructor", || this.project().future.set(None));
        }
    }
}

impl<F> Place<F> {
    pub(super) fn of(future: F) -> Place<F> {
        Place { future: Some(future) }
    }
}

impl<F: Future<Output = ()>> Future for Place<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.project().future.as_pin_mut().map_or(Poll::Ready(()), |future| future.poll(cx))
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::future::{pending, ready};
    use std::sync::Arc;
    use std::task::Waker;

    fn poll<F: Future<Output = ()> + ?Sized>(future: Pin<&mut F>) -> Tried<()> {
        match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(()) => Tried::Done(()),
            Poll::Pending => Tried::Waits(Wait::Open),
        }
    }

    /// Where it lies, if it is ready.
    fn place_of(future: impl Future<Output = ()> + Send + 'static) -> usize {
        let mut place = 0;
        let left = poll_first(future, |future| {
            place = std::ptr::from_ref(&*future).addr();
            poll(future)
        });
        assert!(left.is_ok());
        place
    }

    #[test]
    fn the_next_future_of_a_type_lies_where_the_last_one_did() {
        let counted = Arc::new(());
        let future = |held: Arc<()>| async move { drop(held) };
        let first = place_of(future(Arc::clone(&counted)));
        assert_eq!(place_of(future(Arc::clone(&counted))), first);
        assert_eq!(Arc::strong_count(&counted), 1, "nothing of them is left");
        // Another type, of another size.
        place_of(ready(()));
        place_of(future(counted));
    }

    #[test]
    fn one_that_waits_keeps_its_place_and_the_next_gets_another() {
        let wait = |now: bool| async move {
            if !now {
                pending::<()>().await;
            }
        };
        let Err((mut left, Wait::Open)) = poll_first(wait(false), poll) else { panic!("it waits") };
        let place = place_of(wait(true));
        assert_eq!(poll(left.as_mut()), Tried::Waits(Wait::Open));
        assert_eq!(place_of(wait(true)), place);
    }

    #[test]
    fn a_poll_inside_of_another_has_a_place_of_its_own() {
        fn nested(depth: usize) -> usize {
            place_of(async move {
                if depth > 0 {
                    assert_ne!(nested(depth - 1), 0);
                }
            })
        }
        assert_ne!(nested(2), 0);
    }

    #[test]
    fn one_that_panics_takes_its_memory_along() {
        let panics = || async { panic!("expected") };
        let caught = std::panic::catch_unwind(|| place_of(panics()));
        assert!(caught.is_err());
        place_of(ready(()));
    }
}
