//! The buffer cases: `LinkBuffer` and `Slice` as their users see them.
//!
//! They need no connection and no backend, so they run once. `tests/buffer_oracle` adds random
//! operations against plain vectors.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::sync::mpsc;
use std::thread;

use ringpoll::buffer::{LinkBuffer, Reader, Slice, Writer};

#[test]
fn what_is_written_becomes_readable_with_the_flush() {
    let mut buffer = LinkBuffer::new();
    assert!(buffer.is_empty());
    assert!(buffer.next(10).unwrap_err().is_eof());
    buffer.reserve(128).unwrap();
    assert!(buffer.is_empty());
    assert_eq!(buffer.pending_len(), 128);
    assert!(buffer.peek(10).unwrap_err().is_eof());

    buffer.flush().unwrap();
    assert_eq!((buffer.len(), buffer.pending_len()), (128, 0));
    assert_eq!(buffer.next(28).unwrap().len(), 28);
    assert_eq!(buffer.len(), 100);
    assert_eq!(buffer.peek(90).unwrap().len(), 90);
    assert_eq!(buffer.len(), 100);

    buffer.reserve(8192).unwrap();
    buffer.commit(1024).unwrap();
    assert_eq!((buffer.len(), buffer.pending_len()), (100, 1024));
    buffer.flush().unwrap();
    assert_eq!((buffer.len(), buffer.pending_len()), (1124, 0));
    buffer.skip(1024).unwrap();
    assert_eq!(buffer.len(), 100);
    assert!(buffer.skip(101).unwrap_err().is_eof());
    assert_eq!(buffer.len(), 100);
}

#[test]
fn the_pieces_add_up_to_the_length() {
    let mut buffer = LinkBuffer::new();
    let mut expected = 0;
    for exponent in 0..=6 {
        let bytes = 10_usize.pow(exponent);
        buffer.write_copy(&vec![0; bytes]).unwrap();
        expected += bytes;
    }
    buffer.flush().unwrap();
    assert_eq!(buffer.len(), expected);
    assert_eq!(buffer.slices().map(|piece| piece.len()).sum::<usize>(), expected);
}

#[test]
fn a_length_of_zero_does_nothing_and_does_not_fail() {
    for mut buffer in [LinkBuffer::new(), filled(b"abc")] {
        let len = buffer.len();
        assert!(buffer.reserve(0).unwrap().is_empty());
        buffer.write_copy(&[]).unwrap();
        buffer.write("").unwrap();
        buffer.write(Vec::new()).unwrap();
        buffer.insert("", 0).unwrap();
        buffer.append(LinkBuffer::new()).unwrap();
        buffer.commit(0).unwrap();
        buffer.flush().unwrap();
        assert!(buffer.next(0).unwrap().is_empty());
        assert!(buffer.peek(0).unwrap().is_empty());
        buffer.skip(0).unwrap();
        assert_eq!(buffer.read(&mut []).unwrap(), 0);
        assert_eq!(buffer.read_string(0).unwrap(), "");
        assert!(buffer.read_to_vec(0).unwrap().is_empty());
        assert!(buffer.slice(0).unwrap().is_empty());
        assert_eq!((buffer.len(), buffer.pending_len()), (len, 0));
    }
}

#[test]
fn a_commit_beyond_the_reservation_is_refused_and_changes_nothing() {
    let mut buffer = LinkBuffer::new();
    assert!(buffer.commit(1).unwrap_err().is_invalid());
    buffer.reserve(10).unwrap();
    assert!(buffer.commit(11).unwrap_err().is_invalid());
    assert!(buffer.insert("x", 11).unwrap_err().is_invalid());
    assert_eq!(buffer.pending_len(), 10);
    buffer.commit(10).unwrap();
    assert!(buffer.commit(1).unwrap_err().is_invalid(), "one commit per reservation");
    buffer.reserve(5).unwrap();
    buffer.write_copy(b"end").unwrap();
    assert!(buffer.commit(1).unwrap_err().is_invalid(), "a write ends the reservation");
    assert_eq!(buffer.pending_len(), 18);
}

#[test]
fn tiny_blocks_are_read_across_and_two_reservations_committed_in_part() {
    let mut buffer = LinkBuffer::with_block_bytes(8);
    let bytes = numbers(0..31);
    buffer.reserve(15).unwrap().copy_from_slice(&bytes[..15]);
    buffer.reserve(7).unwrap().copy_from_slice(&bytes[15..22]);
    buffer.flush().unwrap();
    assert!(buffer.slices().count() > 1);
    assert_eq!(buffer.next(13).unwrap(), bytes[..13]);
    assert_eq!(buffer.peek(4).unwrap(), bytes[13..17]);
    assert_eq!(buffer.peek(4).unwrap(), bytes[13..17]);

    // The commit keeps the whole first reservation and a byte of the second.
    buffer.reserve(4).unwrap().copy_from_slice(&bytes[22..26]);
    buffer.reserve(8192).unwrap()[..4].copy_from_slice(&bytes[26..30]);
    buffer.commit(5).unwrap();
    buffer.flush().unwrap();
    assert_eq!(buffer.len(), 14);
    assert_eq!(buffer.next(8).unwrap(), bytes[13..21]);
    buffer.skip(3).unwrap();
    assert_eq!(buffer.next(3).unwrap(), bytes[24..27]);
    assert!(buffer.is_empty());
}

#[test]
fn a_commit_can_drop_the_whole_second_reservation() {
    let mut buffer = LinkBuffer::with_block_bytes(8);
    buffer.reserve(7).unwrap().copy_from_slice(b"abcdefg");
    buffer.reserve(100).unwrap().fill(b'x');
    buffer.commit(3).unwrap();
    buffer.write_copy(b"-end").unwrap();
    buffer.flush().unwrap();
    assert_eq!(all(&mut buffer), b"abc-end");
}

#[test]
fn a_slice_outlives_its_parent_and_the_writes_that_follow() {
    let bytes = numbers(0..100);
    let mut buffer = filled(&bytes);
    let first = buffer.next(10).unwrap();
    let part = first.slice(2..5);
    let mut rest = buffer.slice(50).unwrap();
    buffer.write_copy(&[255; 5000]).unwrap();
    buffer.flush().unwrap();
    drop(first);
    assert_eq!(part, bytes[2..5]);
    drop(buffer);
    assert_eq!(all(&mut rest), bytes[10..60]);
    assert_eq!(part, bytes[2..5]);
}

#[test]
fn the_parent_outlives_a_slice_that_another_thread_drops() {
    let bytes = numbers(0..100);
    let mut buffer = filled(&bytes);
    let slice = buffer.next(10).unwrap();
    thread::spawn(move || drop(slice)).join().unwrap();
    buffer.write_copy(b"more").unwrap();
    buffer.flush().unwrap();
    assert_eq!(buffer.next(90).unwrap(), bytes[10..]);
    assert_eq!(buffer.next(4).unwrap(), "more");
}

#[test]
fn appended_buffers_keep_their_order() {
    let mut buffer = LinkBuffer::new();
    buffer.append(filled(&[2])).unwrap();
    buffer.append(filled(&[3])).unwrap();
    assert!(buffer.is_empty(), "appended bytes wait for the flush");
    buffer.flush().unwrap();
    assert_eq!(all(&mut buffer), [2, 3]);
}

#[test]
fn an_appended_buffer_gives_its_flushed_bytes_and_then_the_others() {
    let large = vec![7; 10_000];
    let mut source = filled(b"flushed ");
    source.write_copy(b"pending ").unwrap();
    source.write(large.clone()).unwrap();
    source.reserve(4).unwrap().copy_from_slice(b"last");
    let mut buffer = LinkBuffer::new();
    buffer.write_copy(b"before ").unwrap();
    buffer.append(source).unwrap();
    buffer.write_copy(b" after").unwrap();
    buffer.flush().unwrap();
    let expected = [b"before flushed pending ", &large[..], b"last after"].concat();
    assert_eq!(all(&mut buffer), expected);
}

#[test]
fn exactly_one_block_and_one_byte_more_are_read() {
    let bytes = numbers(0..24);
    for count in [8, 9] {
        let mut buffer = LinkBuffer::with_block_bytes(8);
        // Three blocks, the first of which is empty when the reads begin.
        for block in bytes.chunks(8) {
            buffer.write_copy(block).unwrap();
        }
        buffer.flush().unwrap();
        assert_eq!(buffer.next(8).unwrap(), bytes[..8]);
        assert_eq!(buffer.peek(count).unwrap(), bytes[8..8 + count]);
        assert_eq!(buffer.next(count).unwrap(), bytes[8..8 + count]);
        assert_eq!(all(&mut buffer), bytes[8 + count..]);
    }
}

#[test]
fn a_second_flush_does_nothing() {
    let mut buffer = LinkBuffer::new();
    buffer.reserve(4).unwrap().copy_from_slice(&[1, 0, 2, 0]);
    buffer.flush().unwrap();
    buffer.flush().unwrap();
    assert_eq!(buffer.peek(4).unwrap(), [1, 0, 2, 0]);
    buffer.skip(2).unwrap();
    buffer.flush().unwrap();
    assert_eq!(buffer.len(), 2);
    buffer.reserve(2).unwrap()[0] = 3;
    buffer.flush().unwrap();
    assert_eq!(all(&mut buffer), [2, 0, 3, 0]);
}

#[test]
fn writing_never_touches_the_memory_of_the_caller() {
    let mut memory = [5_u8; 16];
    let mut buffer = LinkBuffer::with_block_bytes(8);
    buffer.write_copy(&memory[..9]).unwrap();
    buffer.write_copy(&[1]).unwrap();
    buffer.reserve(1).unwrap()[0] = 2;
    buffer.flush().unwrap();
    assert_eq!(memory, [5; 16]);
    memory.fill(6);
    assert_eq!(all(&mut buffer), [[5; 9].as_slice(), &[1, 2]].concat());

    // Owned memory that goes by reference is not written behind its end either.
    let mut owned = Vec::with_capacity(16_384);
    owned.resize(8192, 9);
    buffer.write(owned).unwrap();
    buffer.write_copy(b"tail").unwrap();
    buffer.flush().unwrap();
    assert_eq!(buffer.slices().map(|piece| piece.len()).collect::<Vec<_>>(), [8192, 4]);
}

#[test]
fn bytes_are_inserted_inside_a_reservation() {
    let mut buffer = LinkBuffer::with_block_bytes(32);
    let reserved = buffer.reserve(32).unwrap();
    reserved[..5].copy_from_slice(b"abgmu");
    reserved[5..].copy_from_slice(b"abcdefghijklmnopqrstuvwxyza");
    buffer.insert("cdef", 30).unwrap();
    buffer.insert("hijkl", 29).unwrap();
    buffer.insert("nopqrst", 28).unwrap();
    buffer.insert("vwxyz", 27).unwrap();
    buffer.insert("abcdefghijklmnopqrstuvwxyz", 0).unwrap();
    assert_eq!(buffer.pending_len(), 79);
    buffer.flush().unwrap();
    let alphabet = "abcdefghijklmnopqrstuvwxyz";
    assert_eq!(all(&mut buffer), format!("{alphabet}{alphabet}a{alphabet}").as_bytes());
}

#[test]
fn a_commit_after_an_insertion_counts_what_was_inserted() {
    let inserted = vec![b'b'; 512];
    let mut buffer = LinkBuffer::new();
    let reserved = buffer.reserve(8192).unwrap();
    reserved[..4096].fill(b'a');
    reserved[4096..4112].fill(b'c');
    buffer.insert(inserted.clone(), 4096).unwrap();
    buffer.commit(4096 + 512 + 16).unwrap();
    buffer.flush().unwrap();
    buffer.reserve(4096).unwrap().fill(b'd');
    buffer.write_copy(b"end").unwrap();
    buffer.flush().unwrap();
    assert_eq!(buffer.len(), 4096 + 512 + 16 + 4096 + 3);
    assert_eq!(buffer.next(4096).unwrap(), [b'a'; 4096]);
    assert_eq!(buffer.next(512).unwrap(), inserted);
    assert_eq!(buffer.next(16).unwrap(), [b'c'; 16]);
    assert_eq!(buffer.next(4096).unwrap(), [b'd'; 4096]);
    assert_eq!(buffer.next(3).unwrap(), "end");
}

#[test]
fn a_delimiter_is_found_across_blocks_while_a_producer_appends() {
    let (sender, receiver) = mpsc::channel();
    let producer = thread::spawn(move || {
        for line in 0..1000_usize {
            let mut buffer = LinkBuffer::with_block_bytes(8);
            // Half a line now, the rest with the next one.
            buffer.write_copy(format!("{line}-").as_bytes()).unwrap();
            buffer.reserve(line % 50).unwrap().fill(b'.');
            buffer.write_copy(b"\n>").unwrap();
            buffer.flush().unwrap();
            sender.send(buffer).unwrap();
        }
    });
    let mut buffer = LinkBuffer::with_block_bytes(8);
    for (line, more) in receiver.iter().enumerate() {
        let len = buffer.len();
        assert!(buffer.until(b'\n').unwrap_err().is_eof());
        assert_eq!(buffer.len(), len, "nothing is consumed without a delimiter");
        buffer.append(more).unwrap();
        buffer.flush().unwrap();
        let start = if line == 0 { "" } else { ">" };
        let expected = format!("{start}{line}-{}\n", ".".repeat(line % 50));
        assert_eq!(buffer.until(b'\n').unwrap(), expected);
    }
    producer.join().unwrap();
    assert_eq!(all(&mut buffer), b">");
}

#[test]
fn order_survives_reserve_80_commit_70_against_next_7() {
    let (sender, receiver) = mpsc::sync_channel(4);
    let producer = thread::spawn(move || {
        for _ in 0..500 {
            let mut buffer = LinkBuffer::new();
            let reserved = buffer.reserve(80).unwrap();
            for tens in reserved[..70].chunks_mut(10) {
                tens.copy_from_slice(b"0123456789");
            }
            buffer.commit(70).unwrap();
            sender.send(buffer).unwrap();
        }
    });
    let sevens = ["0123456", "7890123", "4567890", "1234567", "8901234"];
    let sevens = sevens.into_iter().chain(["5678901", "2345678", "9012345", "6789012", "3456789"]);
    let mut sevens = sevens.cycle();
    let mut buffer = LinkBuffer::new();
    let mut read = 0;
    for more in &receiver {
        buffer.append(more).unwrap();
        buffer.flush().unwrap();
        while let Ok(slice) = buffer.next(7) {
            assert_eq!(Some(slice.as_ref()), sevens.next().map(str::as_bytes));
            read += slice.len();
        }
    }
    producer.join().unwrap();
    assert_eq!(read + buffer.len(), 500 * 70);
}

#[test]
fn a_peek_is_never_stale_after_an_advance() {
    let bytes = numbers(0..64);
    let mut buffer = LinkBuffer::with_block_bytes(8);
    for block in bytes.chunks(8) {
        buffer.write_copy(block).unwrap();
    }
    buffer.flush().unwrap();
    let mut at = 0;
    for step in [1, 3, 8, 9, 2, 17] {
        let before = buffer.peek(20).unwrap();
        assert_eq!(before, bytes[at..at + 20]);
        buffer.skip(step).unwrap();
        at += step;
        assert_eq!(buffer.peek(20).unwrap(), bytes[at..at + 20]);
        assert_eq!(before, bytes[at - step..at - step + 20]);
    }
}

#[test]
fn a_length_beyond_32_bits_is_counted() {
    const PIECE: usize = 64 << 20;
    const COUNT: usize = 80;
    let piece = Slice::from(vec![1; PIECE]);
    let mut buffer = LinkBuffer::new();
    for _ in 0..COUNT {
        buffer.write(piece.clone()).unwrap();
    }
    buffer.write_copy(b"end").unwrap();
    buffer.flush().unwrap();
    assert_eq!(buffer.len(), COUNT * PIECE + 3);
    assert!(buffer.len() > u32::MAX as usize);
    assert!(buffer.next(buffer.len() + 1).unwrap_err().is_eof());
    assert_eq!(buffer.peek(PIECE).unwrap().as_ptr(), piece.as_ptr(), "nothing was copied");
    let mut front = buffer.slice(COUNT * PIECE).unwrap();
    assert_eq!(front.len(), COUNT * PIECE);
    front.skip(COUNT * PIECE - 1).unwrap();
    assert_eq!(front.next(1).unwrap(), [1]);
    assert_eq!(all(&mut buffer), b"end");
}

#[test]
fn buffers_and_slices_may_be_dropped_in_any_order() {
    let bytes = numbers(0..200);
    for order in 0..6 {
        let mut buffer = LinkBuffer::with_block_bytes(8);
        buffer.write_copy(&bytes).unwrap();
        buffer.flush().unwrap();
        let first = buffer.next(20).unwrap();
        let mut second = first.clone();
        let third = second.split_off(10);
        let mut owners: Vec<Box<dyn Send>> = vec![Box::new(buffer), Box::new(first)];
        owners.push(Box::new(second));
        owners.swap(0, order % 3);
        for owner in owners.drain(..order % 4) {
            thread::spawn(move || drop(owner)).join().unwrap();
        }
        drop(owners);
        assert_eq!(third, bytes[10..20]);
    }
}

fn filled(bytes: &[u8]) -> LinkBuffer {
    let mut buffer = LinkBuffer::new();
    buffer.write_copy(bytes).unwrap();
    buffer.flush().unwrap();
    buffer
}

fn numbers(range: std::ops::Range<u8>) -> Vec<u8> {
    range.collect()
}

fn all(buffer: &mut LinkBuffer) -> Slice {
    buffer.next(buffer.len()).unwrap()
}
