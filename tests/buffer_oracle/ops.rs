//! Operations on a `LinkBuffer`, and on plain vectors that give the expected results.
//!
//! The property test beside this file and the fuzz target `buffer_ops` share it: both pass a list
//! of (code, size) pairs to [`run`], so a crash of one is a test case for the other.

use std::io::{BufRead, Read, Write};

use bytes::{BufMut, Bytes};
use ringpoll::buffer::{LinkBuffer, Reader, Slice, Writer};

#[derive(Clone, Copy, Debug)]
enum Op {
    Reserve(usize),
    /// Room, and how many bytes are put into it.
    ReserveBuf(usize, usize),
    Commit(usize),
    WriteCopy(usize),
    WriteOwned(usize),
    WriteStatic(usize),
    WriteKept,
    Insert(usize, usize),
    Append,
    Flush,
    Next(usize),
    Peek(usize),
    Skip(usize),
    Until(u8),
    Read(usize),
    Slice(usize),
    ReadString(usize),
    IoRead(usize),
    IoWrite(usize),
    BufRead,
    Swap,
    Rewrite(usize),
    DropKept(usize),
    Frames(usize),
}

impl Op {
    fn decode(code: u8, size: u16) -> Op {
        let index = usize::from(size);
        // Mostly a few bytes, sometimes several of the largest blocks used here.
        let bytes = match size >> 14 {
            0 | 1 => index % 24,
            2 => index % 600,
            _ => index % 10_000,
        };
        match code % 24 {
            0 => Op::Reserve(bytes),
            1 => Op::Commit(bytes),
            2 => Op::WriteCopy(bytes),
            3 => Op::WriteOwned(bytes),
            4 => Op::WriteStatic(bytes),
            5 => Op::WriteKept,
            6 => Op::Insert(bytes, usize::from(code / 24)),
            7 => Op::Append,
            8 => Op::Flush,
            9 => Op::Next(bytes),
            10 => Op::Peek(bytes),
            11 => Op::Skip(bytes),
            12 => Op::Until(code.wrapping_mul(3)),
            13 => Op::Read(bytes),
            14 => Op::Slice(bytes),
            15 => Op::ReadString(bytes),
            16 => Op::IoRead(bytes),
            17 => Op::IoWrite(bytes),
            18 => Op::BufRead,
            19 => Op::Swap,
            20 => Op::Rewrite(index),
            21 => Op::DropKept(index),
            22 => Op::ReserveBuf(bytes, bytes / (1 + usize::from(code / 24))),
            _ => Op::Frames(bytes),
        }
    }
}

/// Runs the operations on buffers with blocks of `block_bytes`, or of the usual size if it is 0.
///
/// # Panics
/// At the first difference.
pub(crate) fn run(block_bytes: usize, codes: impl IntoIterator<Item = (u8, u16)>) {
    let mut world = World {
        subject: Subject::new(block_bytes),
        other: Subject::new(block_bytes),
        kept: Vec::new(),
        written: 0,
    };
    for (code, size) in codes {
        let op = Op::decode(code, size);
        world.step(op);
        world.subject.check(op);
    }
    for (slice, expected) in &world.kept {
        assert_eq!(slice, expected, "a slice that was kept changed");
    }
}

/// A buffer and what must be in it.
struct Subject {
    buffer: LinkBuffer,
    readable: Vec<u8>,
    pending: Vec<u8>,
    /// How much at the end of `pending` the next commit decides about.
    open: usize,
    block_bytes: usize,
}

struct World {
    subject: Subject,
    other: Subject,
    /// Slices that came out, and what must stay in them.
    kept: Vec<(Slice, Vec<u8>)>,
    /// Bytes made up so far, so that no two stretches are alike.
    written: u64,
}

impl World {
    fn step(&mut self, op: Op) {
        match op {
            Op::Reserve(_) | Op::ReserveBuf(..) | Op::Commit(_) | Op::Insert(..) => {
                self.reservation(op);
            }
            Op::WriteCopy(_) | Op::WriteOwned(_) | Op::WriteStatic(_) | Op::WriteKept => {
                self.write(op);
            }
            Op::Append => {
                let block_bytes = self.subject.block_bytes;
                let other = std::mem::replace(&mut self.other, Subject::new(block_bytes));
                let bytes = [other.readable, other.pending].concat();
                self.subject.buffer.append(other.buffer).expect("append");
                self.subject.wrote(&bytes);
            }
            Op::Flush => {
                Writer::flush(&mut self.subject.buffer).expect("flush");
                self.subject.readable.append(&mut self.subject.pending);
                self.subject.open = 0;
            }
            Op::Swap => std::mem::swap(&mut self.subject, &mut self.other),
            Op::IoWrite(bytes) => {
                let data = self.make(bytes);
                self.subject.buffer.write_all(&data).expect("write_all");
                self.subject.wrote(&data);
            }
            Op::Rewrite(index) => self.rewrite(index),
            Op::DropKept(index) if !self.kept.is_empty() => {
                let (slice, expected) = self.kept.swap_remove(index % self.kept.len());
                assert_eq!(slice, expected, "a slice that was kept changed");
            }
            Op::DropKept(_) => {}
            Op::Frames(bytes) => self.frames(bytes),
            _ => self.read(op),
        }
    }

    /// Takes up to three frames of `bytes`, whose length is known from some more or fewer bytes.
    fn frames(&mut self, bytes: usize) {
        let Subject { buffer, readable, .. } = &mut self.subject;
        let (bytes, header_bytes) = (bytes.max(1), bytes % 13);
        let mut frames =
            buffer.frames(20_000, |front| Ok((front.len() >= header_bytes).then_some(bytes)));
        for _ in 0..3 {
            let is_whole = readable.len() >= bytes.max(header_bytes);
            let expected = is_whole.then(|| readable.drain(..bytes).collect::<Vec<_>>());
            assert_eq!(frames.try_next().expect("within the limit"), expected.as_deref());
        }
    }

    fn reservation(&mut self, op: Op) {
        let data = self.make(match op {
            Op::Reserve(bytes) | Op::ReserveBuf(_, bytes) | Op::Insert(bytes, _) => bytes,
            _ => 0,
        });
        let subject = &mut self.subject;
        match op {
            Op::Reserve(bytes) => {
                let reserved = subject.buffer.reserve(bytes).expect("reserve");
                assert!(reserved.len() == bytes && reserved.iter().all(|&byte| byte == 0));
                reserved.copy_from_slice(&data);
                subject.pending.extend(data);
                subject.open += bytes;
            }
            Op::ReserveBuf(room, _) => {
                let mut reserved = subject.buffer.reserve_buf(room).expect("reserve_buf");
                assert_eq!(reserved.remaining_mut(), room);
                data.chunks(7).for_each(|part| reserved.put_slice(part));
                assert_eq!(reserved.remaining_mut(), room - data.len());
                subject.pending.extend(data);
                subject.open = 0;
            }
            Op::Commit(bytes) => match subject.buffer.commit(bytes) {
                Ok(()) => {
                    subject.pending.truncate(subject.pending.len() - (subject.open - bytes));
                    subject.open = 0;
                }
                Err(error) => assert!(error.is_invalid() && bytes > subject.open),
            },
            Op::Insert(bytes, remaining) => match subject.buffer.insert(data.clone(), remaining) {
                Ok(()) => {
                    let at = subject.pending.len() - remaining;
                    subject.pending.splice(at..at, data);
                    subject.open += bytes;
                }
                Err(error) => assert!(error.is_invalid() && remaining > subject.open),
            },
            _ => unreachable!("not a reservation: {op:?}"),
        }
    }

    fn write(&mut self, op: Op) {
        static STATIC: [u8; 10_000] = [b's'; 10_000];
        match op {
            Op::WriteCopy(bytes) => {
                let data = self.make(bytes);
                self.subject.buffer.write_copy(&data).expect("write_copy");
                self.subject.wrote(&data);
            }
            Op::WriteOwned(bytes) => {
                let data = self.make(bytes);
                Writer::write(&mut self.subject.buffer, data.clone()).expect("write");
                self.subject.wrote(&data);
            }
            Op::WriteStatic(bytes) => {
                Writer::write(&mut self.subject.buffer, &STATIC[..bytes]).expect("write");
                self.subject.wrote(&STATIC[..bytes]);
            }
            _ => {
                if let Some((slice, expected)) = self.kept.last() {
                    Writer::write(&mut self.subject.buffer, slice.clone()).expect("write");
                    self.subject.wrote(expected);
                }
            }
        }
    }

    fn read(&mut self, op: Op) {
        let Subject { buffer, readable, .. } = &mut self.subject;
        let (result, expected) = match op {
            Op::Next(bytes) => (buffer.next(bytes), take(readable, bytes)),
            Op::Peek(bytes) => (buffer.peek(bytes), readable.get(..bytes).map(<[u8]>::to_vec)),
            Op::Skip(bytes) => (
                buffer.skip(bytes).map(|()| Slice::new()),
                take(readable, bytes).map(|_| Vec::new()),
            ),
            Op::Until(byte) => {
                let found = readable.iter().position(|&other| other == byte);
                (buffer.until(byte), found.and_then(|index| take(readable, index + 1)))
            }
            Op::Read(bytes) => {
                let mut into = vec![0; bytes];
                let count = Reader::read(buffer, &mut into).expect("read");
                into.truncate(count);
                (Ok(into.into()), take(readable, bytes.min(readable.len())))
            }
            Op::IoRead(bytes) => {
                let mut into = vec![0; bytes];
                let count = Read::read(buffer, &mut into).expect("read");
                into.truncate(count);
                (Ok(into.into()), take(readable, bytes.min(readable.len())))
            }
            Op::BufRead => {
                let front = buffer.fill_buf().expect("fill_buf").to_vec();
                assert_eq!(front.is_empty(), readable.is_empty());
                buffer.consume(front.len());
                let expected = take(readable, front.len());
                (Ok(front.into()), expected)
            }
            Op::Slice(bytes) => {
                let part = buffer.slice(bytes);
                (part.and_then(|mut part| part.next(part.len())), take(readable, bytes))
            }
            Op::ReadString(bytes) => match buffer.read_string(bytes) {
                Err(error) if error.is_invalid() => {
                    let removed = take(readable, bytes).expect("as many were readable");
                    assert!(std::str::from_utf8(&removed).is_err(), "{op:?}");
                    return;
                }
                result => (result.map(Slice::from), take(readable, bytes)),
            },
            _ => unreachable!("not a read: {op:?}"),
        };
        match (result, expected) {
            (Ok(slice), Some(expected)) => {
                assert_eq!(slice, expected, "{op:?}");
                self.kept.push((slice, expected));
            }
            (Err(error), None) => assert!(error.is_eof() && error.partial().is_none(), "{op:?}"),
            (result, expected) => panic!("{op:?}: {result:?} instead of {expected:?}"),
        }
    }

    /// Takes a slice that was kept apart and keeps the parts.
    fn rewrite(&mut self, index: usize) {
        let Some((mut slice, mut expected)) = self.kept.pop() else { return };
        let at = index % (slice.len() + 1);
        match index % 6 {
            0 => {
                self.kept.push((slice.split_to(at), expected.drain(..at).collect()));
            }
            1 => self.kept.push((slice.split_off(at), expected.split_off(at))),
            2 => {
                self.kept.push((slice.slice(at..), expected[at..].to_vec()));
            }
            3 => slice = Slice::from(Bytes::from(slice)),
            4 => {
                slice.advance(at);
                expected.drain(..at);
            }
            _ => {
                slice = slice.clone();
                slice.truncate(at);
                expected.truncate(at);
            }
        }
        self.kept.push((slice, expected));
    }

    fn make(&mut self, bytes: usize) -> Vec<u8> {
        let start = self.written;
        self.written += bytes as u64;
        (start..self.written).map(|index| (index.wrapping_mul(0x9E37_79B9) >> 16) as u8).collect()
    }
}

impl Subject {
    fn new(block_bytes: usize) -> Subject {
        let buffer = match block_bytes {
            0 => LinkBuffer::new(),
            _ => LinkBuffer::with_block_bytes(block_bytes),
        };
        Subject { buffer, readable: Vec::new(), pending: Vec::new(), open: 0, block_bytes }
    }

    /// What every write but a reservation does to the model.
    fn wrote(&mut self, data: &[u8]) {
        if !data.is_empty() {
            self.pending.extend(data);
            self.open = 0;
        }
    }

    fn check(&self, op: Op) {
        assert_eq!(self.buffer.len(), self.readable.len(), "length after {op:?}");
        assert_eq!(self.buffer.pending_len(), self.pending.len(), "pending after {op:?}");
        let mut expected = &self.readable[..];
        for piece in self.buffer.slices() {
            assert!(!piece.is_empty() && expected.starts_with(piece), "bytes after {op:?}");
            expected = &expected[piece.len()..];
        }
        assert!(expected.is_empty(), "bytes after {op:?}");
    }
}

fn take(model: &mut Vec<u8>, bytes: usize) -> Option<Vec<u8>> {
    (bytes <= model.len()).then(|| model.drain(..bytes).collect())
}
