//! What a case sees and holds of a handler.

use std::sync::Arc;

use tokio::sync::Semaphore;

/// Tells a case when its handler begins and is dropped, and lets the handler go on.
#[derive(Clone)]
pub(crate) struct Probe(Arc<Counts>);

struct Counts {
    begun: Semaphore,
    dropped: Semaphore,
    released: Semaphore,
}

impl Default for Probe {
    fn default() -> Probe {
        let [begun, dropped, released] = [0; 3].map(Semaphore::new);
        Probe(Arc::new(Counts { begun, dropped, released }))
    }
}

/// Held by a handler while it runs.
pub(crate) struct Guard(Probe);

impl Probe {
    /// Called where the handler begins.
    pub(crate) fn guard(&self) -> Guard {
        self.0.begun.add_permits(1);
        Guard(self.clone())
    }

    /// A handler that answers after [`release`](Self::release).
    pub(crate) fn handler(
        &self,
    ) -> impl Fn() -> std::pin::Pin<Box<dyn Future<Output = &'static str> + Send>>
    + Clone
    + Send
    + Sync
    + 'static {
        let probe = self.clone();
        move || {
            let guard = probe.guard();
            Box::pin(async move {
                guard.until_released().await;
                "answered"
            })
        }
    }

    pub(crate) async fn begun(&self) {
        self.0.begun.acquire().await.expect("never closed").forget();
    }

    pub(crate) async fn dropped(&self) {
        self.0.dropped.acquire().await.expect("never closed").forget();
    }

    /// Lets one handler go on.
    pub(crate) fn release(&self) {
        self.0.released.add_permits(1);
    }
}

impl Guard {
    pub(crate) async fn until_released(&self) {
        self.0.0.released.acquire().await.expect("never closed").forget();
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.0.dropped.add_permits(1);
    }
}
