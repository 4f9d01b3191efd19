//! The table of entries: one for each slot of the poller that has operations in this ring.

use super::entry::Entry;
use super::tag;
use crate::sys::Token;

#[derive(Default)]
pub(super) struct Entries(Vec<Option<Entry>>);

impl Entries {
    /// Adds an entry, and returns it.
    ///
    /// # Panics
    /// When the slot of the entry's token has an entry.
    pub(super) fn insert(&mut self, entry: Entry) -> &mut Entry {
        let index = entry.token.index();
        if index >= self.0.len() {
            self.0.resize_with(index + 1, || None);
        }
        assert!(self.0[index].is_none(), "slot {index} is in use");
        self.0[index].insert(entry)
    }

    pub(super) fn find(&mut self, token: Token) -> Option<&mut Entry> {
        self.0.get_mut(token.index())?.as_mut().filter(|entry| entry.token == token)
    }

    /// The entry that a completion names. `None`: the completion belongs to no entry.
    pub(super) fn find_by_user_data(&mut self, user_data: u64) -> Option<&mut Entry> {
        let entry = self.0.get_mut(tag::index(user_data))?.as_mut()?;
        (tag::token_payload(entry.token) == tag::payload(user_data)).then_some(entry)
    }

    /// The token has an entry, and `remove` was not called for it.
    pub(super) fn is_live(&self, token: Token) -> bool {
        let entry = self.0.get(token.index()).and_then(Option::as_ref);
        entry.is_some_and(|entry| entry.token == token && !entry.removing)
    }

    /// Frees the slot of the token. The entry's last operation must have completed.
    pub(super) fn forget(&mut self, token: Token) {
        self.0[token.index()] = None;
    }

    /// Removes all entries.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Entry> {
        std::mem::take(&mut self.0).into_iter().flatten()
    }
}
