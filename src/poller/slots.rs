//! Slots: the owner of each token.
//!
//! A slot's generation changes each time the slot is freed. So a completion that comes late matches
//! no slot.

use crate::sys::Token;

pub(crate) struct Slots<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
}

struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

impl<T> Slots<T> {
    pub(crate) fn new() -> Slots<T> {
        Slots { slots: Vec::new(), free: Vec::new() }
    }

    pub(crate) fn insert(&mut self, value: T) -> Token {
        if let Some(index) = self.free.pop() {
            let slot = &mut self.slots[index as usize];
            slot.value = Some(value);
            return Token::new(index, slot.generation);
        }
        let index = u32::try_from(self.slots.len()).expect("fewer slots than descriptors");
        self.slots.push(Slot { generation: 0, value: Some(value) });
        Token::new(index, 0)
    }

    pub(crate) fn get(&self, token: Token) -> Option<&T> {
        let slot = self.slots.get(token.index())?;
        slot.value.as_ref().filter(|_| slot.generation == token.generation())
    }

    pub(crate) fn get_mut(&mut self, token: Token) -> Option<&mut T> {
        let slot = self.slots.get_mut(token.index())?;
        slot.value.as_mut().filter(|_| slot.generation == token.generation())
    }

    pub(crate) fn remove(&mut self, token: Token) -> Option<T> {
        let slot = self.slots.get_mut(token.index())?;
        if slot.generation != token.generation() {
            return None;
        }
        let value = slot.value.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(token.index() as u32);
        Some(value)
    }

    /// Empties every slot.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = T> {
        self.free.clear();
        self.slots.drain(..).filter_map(|slot| slot.value)
    }

    pub(crate) fn count(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Token, &T)> {
        self.slots.iter().enumerate().filter_map(|(index, slot)| {
            let value = slot.value.as_ref()?;
            Some((Token::new(index as u32, slot.generation), value))
        })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn an_old_token_of_a_reused_slot_names_nobody() {
        let mut slots = Slots::new();
        let old = slots.insert("a");
        assert_eq!(slots.remove(old), Some("a"));
        let new = slots.insert("b");
        assert_eq!(new.index(), old.index());
        assert_eq!(slots.get(old), None);
        assert_eq!(slots.remove(old), None);
        assert_eq!(slots.get(new), Some(&"b"));
        assert_eq!(slots.count(), 1);
    }
}
