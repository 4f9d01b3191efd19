//! The scenario mux: one long run for each connection, a task for each request, replies in any
//! order.

use std::sync::Arc;

use ringpoll::{Connection, Error, Mux};
use tokio::sync::Semaphore;

use super::frame_bytes;
use crate::wire::{HEADER_BYTES, REQUESTS_MAX};

/// Serves a connection until its peer has ended its side and got all replies.
pub(super) async fn serve(connection: Connection, frame_max: usize) -> ringpoll::Result<()> {
    let (mut reader, writer) = connection.split();
    let (mux, driver) = Mux::new(writer);
    reader.spawn(driver)?;
    // A peer that sends and does not read must not fill this process with its requests.
    let places = Arc::new(Semaphore::new(REQUESTS_MAX));
    while reader.readable().await? > 0 {
        let header = reader.peek(HEADER_BYTES).await?;
        let frame = reader.next(frame_bytes(&header, frame_max)?).await?;
        let place = Arc::clone(&places).acquire_owned().await.map_err(Error::other)?;
        let mux = mux.clone();
        reader.spawn(async move {
            // Composed in a buffer of its own, as a server does that computes it.
            let reply = frame.to_vec();
            drop(frame);
            let sent = mux.send(reply).await;
            drop(place);
            sent
        })?;
    }
    Ok(())
}
