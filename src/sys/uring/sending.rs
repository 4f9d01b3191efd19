//! A send in the kernel, and the memory that its operation names.
//!
//! A `Sending` owns the blocks, the list of their addresses and the message header. A `Sending` is
//! boxed, and its owner keeps the box until the last completion of the operation. So the memory
//! neither moves nor is freed while the kernel uses it. A `Sending` has one operation at a time.
//! `send_record.rs` tells how long the kernel uses the memory of a zero-copy send.

use std::io;

use io_uring::opcode;
use io_uring::squeue::Entry;

use super::raw::SEND_ZC_REPORT_USAGE;
use super::ring::fd_of;
use crate::buffer::Chain;
use crate::config::{self, ZeroCopyRule};
use crate::counters::Counters;
use crate::sys::Socket;

pub(super) struct Sending {
    rest: Chain,
    sent_bytes: usize,
    /// Bytes that the operation in flight names.
    asked_bytes: usize,
    /// The operation in flight is a zero-copy send.
    is_zero_copy: bool,
    /// The operation before sent fewer bytes than asked.
    was_cut_short: bool,
    iovs: Vec<libc::iovec>,
    header: libc::msghdr,
}

/// What a completion means for a send.
#[derive(Debug)]
pub(super) enum Progress {
    /// Bytes are left to send.
    Unfinished,
    /// The send is over: every byte is sent, or the send failed.
    Done(io::Result<usize>),
}

impl Sending {
    pub(super) fn new(bytes: Chain) -> Sending {
        // SAFETY: `msghdr` is made of integers and pointers. All zeroes is a header without an
        // address, without data and without control data.
        let header = unsafe { std::mem::zeroed() };
        Sending {
            rest: bytes,
            sent_bytes: 0,
            asked_bytes: 0,
            is_zero_copy: false,
            was_cut_short: false,
            iovs: Vec::new(),
            header,
        }
    }

    /// The unsent bytes.
    pub(super) fn into_rest(self) -> Chain {
        self.rest
    }

    /// How many bytes are unsent.
    pub(super) fn rest_bytes(&self) -> usize {
        self.rest.len()
    }

    /// The next operation of the send, zero-copy if `zero_copy` is given.
    ///
    /// The operation names memory of `self`. `self` must neither move nor change until the
    /// operation's result.
    pub(super) fn prepare(
        &mut self,
        socket: &Socket,
        user_data: u64,
        zero_copy: Option<ZeroCopyRule>,
    ) -> Entry {
        let fd = fd_of(socket);
        let front = self.rest.front_slice();
        self.is_zero_copy = zero_copy.is_some();
        let has_report = zero_copy.is_some_and(|rule| rule.has_reports);
        let usage = if has_report { SEND_ZC_REPORT_USAGE } else { 0 };
        let sqe = if front.len() == self.rest.len() {
            self.asked_bytes = front.len().min(BYTES_MAX);
            let (start, bytes) = (front.as_ptr(), self.asked_bytes as u32);
            if self.is_zero_copy {
                opcode::SendZc::new(fd, start, bytes).flags(FLAGS).zc_flags(usage).build()
            } else {
                opcode::Send::new(fd, start, bytes).flags(FLAGS).build()
            }
        } else {
            self.gather();
            if self.is_zero_copy {
                let message = &raw const self.header;
                opcode::SendMsgZc::new(fd, message).flags(FLAGS as u32).ioprio(usage).build()
            } else {
                opcode::SendMsg::new(fd, &raw const self.header).flags(FLAGS as u32).build()
            }
        };
        sqe.user_data(user_data)
    }

    /// The memory that the operation in flight names.
    pub(super) fn named(&self) -> Chain {
        let mut named = Chain::new();
        let mut bytes_left = self.asked_bytes;
        for slice in self.rest.slices() {
            if bytes_left == 0 {
                break;
            }
            bytes_left = bytes_left.saturating_sub(slice.len());
            named.push(slice.clone());
        }
        named
    }

    /// Takes the result of the operation on `socket`.
    pub(super) fn complete(
        &mut self,
        result: i32,
        socket: &Socket,
        counters: &Counters,
    ) -> Progress {
        let Ok(bytes) = usize::try_from(result) else {
            return match -result {
                // The kernel may lock no more memory for zero-copy sends (RLIMIT_MEMLOCK), or has
                // none for a notification. An ordinary send needs neither.
                libc::ENOMEM | libc::ENOBUFS if self.is_zero_copy => {
                    counters.zero_copy_stops.add_owned(u64::from(socket.pause_zero_copy()));
                    Progress::Unfinished
                }
                // The kernel sent nothing, and the connection works.
                libc::EAGAIN | libc::EINTR | libc::ENOMEM | libc::ENOBUFS | libc::ECANCELED => {
                    Progress::Unfinished
                }
                // TCP fast open: the kernel connects without bytes, because it has no cookie any
                // more. The next operation waits for the connection.
                libc::EINPROGRESS => Progress::Unfinished,
                // The kernel refuses zero-copy sends on some TCP sockets: with multipath TCP, or
                // with TLS in the kernel.
                libc::EOPNOTSUPP if self.is_zero_copy => {
                    socket.refuse_zero_copy();
                    counters.zero_copy_stops.add_owned(1);
                    Progress::Unfinished
                }
                // The operation before met an error after some bytes. The kernel reported only the
                // bytes, and forgot the error. On TCP that error is most likely a reset: a reset
                // after the end of the peer's stream would be this error as well.
                libc::EPIPE if self.was_cut_short && socket.is_tcp() => {
                    Progress::Done(Err(io::Error::from_raw_os_error(libc::ECONNRESET)))
                }
                errno => Progress::Done(Err(io::Error::from_raw_os_error(errno))),
            };
        };
        counters.sent_bytes.add_owned(bytes as u64);
        self.sent_bytes += bytes;
        self.rest.advance(bytes.min(self.asked_bytes));
        self.was_cut_short = bytes < self.asked_bytes;
        match self.rest.is_empty() {
            true => Progress::Done(Ok(self.sent_bytes)),
            // One message did not hold all slices, or the kernel sent fewer bytes than asked. In
            // the second case the next operation fails as well.
            false => Progress::Unfinished,
        }
    }

    fn gather(&mut self) {
        self.iovs.clear();
        self.asked_bytes = 0;
        for slice in self.rest.slices().take(config::GATHER_SLICES_MAX) {
            self.asked_bytes += slice.len();
            let start = slice.as_ptr().cast_mut().cast();
            self.iovs.push(libc::iovec { iov_base: start, iov_len: slice.len() });
        }
        self.header.msg_iov = self.iovs.as_mut_ptr();
        self.header.msg_iovlen = self.iovs.len();
    }
}

/// `MSG_WAITALL`: the kernel retries until every byte is sent. `MSG_NOSIGNAL`: a closed peer is an
/// error, not a signal.
const FLAGS: i32 = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;

/// The most bytes of one operation: its result is an i32.
const BYTES_MAX: usize = 1 << 30;
