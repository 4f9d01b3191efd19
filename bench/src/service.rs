//! What every server does with a request, so that all of them do the same.

use bytes::Bytes;

use crate::wire::{TooLong, append_replies, is_heavy, whole_frames};
use crate::work::Work;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Service {
    /// Longest payload; a longer one closes its connection.
    pub(crate) frame_max: usize,
    /// What a marked request costs before its reply; `None` in the scenario echo.
    pub(crate) work: Option<Work>,
}

impl Service {
    /// Appends the replies to the whole frames at the front of `input`; how many bytes those are.
    pub(crate) fn answer(&self, input: &[u8], out: &mut Vec<u8>) -> Result<usize, TooLong> {
        let whole = whole_frames(input, self.frame_max)?;
        self.answer_whole(&input[..whole], out);
        Ok(whole)
    }

    /// The same for what is known to be whole frames.
    pub(crate) fn answer_whole(&self, frames: &[u8], out: &mut Vec<u8>) {
        append_replies(frames, out, |payload| self.work_for(payload));
    }

    /// Computes what a request with this payload asks for.
    pub(crate) fn work_for(&self, payload: &[u8]) {
        if let Some(work) = self.work.filter(|_| is_heavy(payload)) {
            work.run();
        }
    }

    /// The payload of a reply, composed in a buffer of its own, as a method does that computes it.
    pub(crate) fn reply_to(&self, payload: &[u8]) -> Bytes {
        self.work_for(payload);
        Bytes::copy_from_slice(payload)
    }
}
