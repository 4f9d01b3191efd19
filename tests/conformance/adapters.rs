//! The adapter cases: readers and writers over `std::io` and back.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::io::{self, Read, Write};

use ringpoll::buffer::{AsRead, AsWrite, IoReader, IoWriter, LinkBuffer, Reader, Writer};

#[test]
fn an_endless_source_gives_exactly_what_is_asked() {
    let mut reader = IoReader::new(Counting(0));
    let mut at = 0;
    for bytes in [0, 1, 255, 4096, 4097, 100_000] {
        assert_eq!(reader.peek(bytes).unwrap(), counted(at, bytes));
        assert_eq!(reader.next(bytes).unwrap(), counted(at, bytes));
        at += bytes;
        reader.skip(3).unwrap();
        at += 3;
        assert_eq!(reader.read_to_vec(7).unwrap(), counted(at, 7));
        at += 7;
        let mut part = reader.slice(bytes).unwrap();
        assert_eq!(part.next(part.len()).unwrap(), counted(at, bytes));
        at += bytes;
    }
    let line = reader.until(0).unwrap();
    assert_eq!(line, counted(at, line.len()));
    assert_eq!(line.iter().position(|&byte| byte == 0), Some(line.len() - 1));
}

#[test]
fn the_sink_sees_nothing_before_the_flush() {
    let mut writer = IoWriter::new(Vec::new());
    writer.reserve(4).unwrap().copy_from_slice(b"head");
    writer.commit(2).unwrap();
    writer.write("static").unwrap();
    writer.write(vec![b'.'; 10_000]).unwrap();
    writer.write_copy(b"copy").unwrap();
    let mut other = LinkBuffer::new();
    other.write_copy(b"other").unwrap();
    writer.append(other).unwrap();
    assert_eq!(writer.pending_len(), 2 + 6 + 10_000 + 4 + 5);
    assert!(writer.sink().is_empty());
    writer.flush().unwrap();
    assert_eq!(writer.pending_len(), 0);
    let expected = [b"hestatic", &[b'.'; 10_000][..], b"copyother"].concat();
    assert_eq!(writer.into_inner(), expected);
}

#[test]
fn what_a_failing_sink_refused_goes_first_the_next_time() {
    let mut writer = IoWriter::new(Stubborn { taken: Vec::new(), budget: 5 });
    writer.write_copy(b"0123456789").unwrap();
    let error = writer.flush().unwrap_err();
    assert_eq!(error.io_kind(), io::ErrorKind::WouldBlock);
    assert_eq!(writer.pending_len(), 5);
    writer.write_copy(b"abc").unwrap();
    writer.sink_mut().budget = 100;
    writer.flush().unwrap();
    assert_eq!(writer.into_inner().taken, b"0123456789abc");
}

#[test]
fn the_end_of_a_source_is_eof_and_leaves_the_rest_readable() {
    let mut reader = IoReader::new(&b"0123456789"[..]);
    assert_eq!(reader.next(4).unwrap(), "0123");
    let error = reader.next(7).unwrap_err();
    assert!(error.is_eof() && error.is_closed());
    assert_eq!(reader.len(), 6);
    assert_eq!(reader.next(1).unwrap(), "4");
    let error = reader.until(b'x').unwrap_err();
    assert!(error.is_eof());
    assert_eq!(error.partial().unwrap().as_ref(), b"56789");
    assert_eq!(reader.read(&mut [0; 8]).unwrap(), 0);
    assert!(reader.is_empty());
}

#[test]
fn an_error_of_the_source_is_reported_with_its_kind() {
    let mut reader = IoReader::new(b"ab".chain(Broken));
    assert_eq!(reader.next(3).unwrap_err().io_kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(reader.next(2).unwrap(), "ab");
}

#[test]
fn a_string_that_is_not_utf8_is_removed() {
    let bytes = &b"\xff\xffok"[..];
    let mut buffer = LinkBuffer::new();
    buffer.write_copy(bytes).unwrap();
    Writer::flush(&mut buffer).unwrap();
    reads_past_the_string(buffer);
    reads_past_the_string(IoReader::new(bytes));
}

fn reads_past_the_string(mut reader: impl Reader) {
    assert!(reader.read_string(2).unwrap_err().is_invalid());
    assert!(reader.read_string(3).unwrap_err().is_eof());
    assert_eq!(reader.read_string(2).unwrap(), "ok");
}

#[test]
fn what_goes_in_at_one_end_comes_out_at_the_other() {
    let sent = counted(0, 300_000);
    let mut sink = AsWrite(LinkBuffer::new());
    for chunk in sent.chunks(777) {
        sink.write_all(chunk).unwrap();
    }
    assert!(sink.0.is_empty(), "nothing is readable before the flush");
    sink.flush().unwrap();
    let buffer = sink.0;
    let mut writer = IoWriter::new(Vec::new());
    writer.append(buffer).unwrap();
    writer.flush().unwrap();
    let stored = writer.into_inner();

    let mut reader = IoReader::new(stored.as_slice());
    let mut received = reader.next(1000).unwrap().to_vec();
    let (mut source, mut buffered) = reader.into_inner();
    Read::read_to_end(&mut buffered, &mut received).unwrap();
    source.read_to_end(&mut received).unwrap();
    assert_eq!(received, sent);
}

#[test]
fn read_to_end_ends() {
    let sent = counted(0, 20_000);
    let mut received = Vec::new();
    let mut source = AsRead(IoReader::new(sent.as_slice()));
    assert_eq!(source.read_to_end(&mut received).unwrap(), sent.len());
    assert_eq!(received, sent);
    assert_eq!(source.read(&mut [0; 1]).unwrap(), 0);

    let mut buffer = LinkBuffer::new();
    buffer.write_copy(&sent).unwrap();
    Writer::flush(&mut buffer).unwrap();
    received.clear();
    assert_eq!(AsRead(buffer).read_to_end(&mut received).unwrap(), sent.len());
    assert_eq!(received, sent);
}

/// An endless source of bytes that count up, a few at a time.
struct Counting(usize);

impl Read for Counting {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let bytes = into.len().min(1000);
        into[..bytes].copy_from_slice(&counted(self.0, bytes));
        self.0 += bytes;
        Ok(bytes)
    }
}

/// A sink that takes three bytes at a time, up to its budget.
struct Stubborn {
    taken: Vec<u8>,
    budget: usize,
}

impl Write for Stubborn {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let bytes = data.len().min(self.budget).min(3);
        if bytes == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.taken.extend(&data[..bytes]);
        self.budget -= bytes;
        Ok(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A source that was reset.
struct Broken;

impl Read for Broken {
    fn read(&mut self, _into: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

fn counted(start: usize, bytes: usize) -> Vec<u8> {
    (start..start + bytes).map(|index| (index % 251) as u8).collect()
}
