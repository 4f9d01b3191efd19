//! Bytes that the kernel is sending.
//!
//! A `Sending` owns everything that its operation names: the blocks, the list of their addresses,
//! the message header. It lives in a box, which the entry holds until the operation's last
//! completion, so nothing moves and nothing is freed under the kernel. One operation at a time.

use io_uring::cqueue;
use io_uring::opcode;
use io_uring::squeue::Entry;
use io_uring::types::Fd;

use super::ring::Done;
use crate::buffer::Chain;
use crate::config;
use crate::counters::Counters;
use crate::sys::Socket;

pub(super) struct Sending {
    rest: Chain,
    sent_bytes: usize,
    /// Asked for by the operation under way.
    asked_bytes: usize,
    /// The operation under way sends from our memory, without a copy.
    is_zero_copy: bool,
    iovs: Vec<libc::iovec>,
    header: libc::msghdr,
    /// The result of a send whose memory the kernel still uses.
    waits_for_notice: Option<i32>,
}

/// What a completion means for a send.
#[derive(Debug)]
pub(super) enum Progress {
    /// The operation is not over.
    Pending,
    /// Some bytes are left: submit again.
    Unfinished,
    /// All of them are through, or never will be.
    Done(std::io::Result<usize>),
}

impl Sending {
    pub(super) fn new() -> Sending {
        Sending {
            rest: Chain::new(),
            sent_bytes: 0,
            asked_bytes: 0,
            is_zero_copy: false,
            iovs: Vec::new(),
            header: empty_header(),
            waits_for_notice: None,
        }
    }

    /// Takes on new bytes; those before are through.
    pub(super) fn begin(&mut self, bytes: Chain) {
        self.rest = bytes;
        self.sent_bytes = 0;
    }

    /// Lets go of the bytes.
    pub(super) fn end(&mut self) {
        self.rest.clear();
    }

    /// The bytes that are not through.
    pub(super) fn into_rest(self) -> Chain {
        self.rest
    }

    /// The next send: it names memory of `self`, which must stay as and where it is until
    /// [`complete`](Self::complete) has said that the operation is over.
    pub(super) fn prepare(&mut self, fd: Fd, user_data: u64, zero_copy_bytes_min: usize) -> Entry {
        let front = self.rest.front_slice();
        self.is_zero_copy = self.rest.len() >= zero_copy_bytes_min;
        let sqe = if front.len() == self.rest.len() {
            self.asked_bytes = front.len().min(BYTES_MAX);
            let (start, bytes) = (front.as_ptr(), self.asked_bytes as u32);
            if self.is_zero_copy {
                opcode::SendZc::new(fd, start, bytes).flags(FLAGS).build()
            } else {
                opcode::Send::new(fd, start, bytes).flags(FLAGS).build()
            }
        } else {
            self.gather();
            if self.is_zero_copy {
                opcode::SendMsgZc::new(fd, &raw const self.header).flags(FLAGS as u32).build()
            } else {
                opcode::SendMsg::new(fd, &raw const self.header).flags(FLAGS as u32).build()
            }
        };
        sqe.user_data(user_data)
    }

    /// Takes one completion of the operation, which was on `socket`.
    pub(super) fn complete(
        &mut self,
        done: Done,
        socket: &Socket,
        counters: &Counters,
    ) -> Progress {
        if cqueue::notif(done.flags) {
            // The kernel has let go of the memory.
            return match self.waits_for_notice.take() {
                Some(result) => self.settle(result, socket, counters),
                None => Progress::Pending,
            };
        }
        if cqueue::more(done.flags) {
            self.waits_for_notice = Some(done.result);
            return Progress::Pending;
        }
        self.settle(done.result, socket, counters)
    }

    fn settle(&mut self, result: i32, socket: &Socket, counters: &Counters) -> Progress {
        let Ok(bytes) = usize::try_from(result) else {
            return match -result {
                // Nothing was sent, and nothing is wrong with the connection.
                libc::EAGAIN | libc::EINTR | libc::ENOMEM | libc::ENOBUFS | libc::ECANCELED => {
                    Progress::Unfinished
                }
                // The kernel takes no send without a copy on some TCP sockets: with multipath TCP,
                // or with TLS in the kernel. The next send is made with a copy.
                libc::EOPNOTSUPP if self.is_zero_copy => {
                    socket.refuse_zero_copy();
                    Progress::Unfinished
                }
                errno => Progress::Done(Err(std::io::Error::from_raw_os_error(errno))),
            };
        };
        counters.sent_bytes.add_owned(bytes as u64);
        self.sent_bytes += bytes;
        self.rest.advance(bytes.min(self.asked_bytes));
        match self.rest.is_empty() {
            true => Progress::Done(Ok(self.sent_bytes)),
            // More pieces than one message takes; or the send was cut short, and the next one will
            // tell why.
            false => Progress::Unfinished,
        }
    }

    fn gather(&mut self) {
        self.iovs.clear();
        self.asked_bytes = 0;
        for piece in self.rest.slices().take(config::GATHER_SLICES_MAX) {
            self.asked_bytes += piece.len();
            let start = piece.as_ptr().cast_mut().cast();
            self.iovs.push(libc::iovec { iov_base: start, iov_len: piece.len() });
        }
        self.header.msg_iov = self.iovs.as_mut_ptr();
        self.header.msg_iovlen = self.iovs.len();
    }
}

/// From how many bytes on a send on `socket` is to go without a copy.
pub(super) fn zero_copy_bytes_min(asked: Option<usize>, socket: &Socket) -> usize {
    match asked {
        Some(bytes_min) if socket.takes_zero_copy() => bytes_min,
        _ => usize::MAX,
    }
}

fn empty_header() -> libc::msghdr {
    // SAFETY: all zeroes is a message header with no address, no data and no control data.
    unsafe { std::mem::zeroed() }
}

/// The kernel retries by itself until everything is sent; a dead peer is an error, not a signal.
const FLAGS: i32 = libc::MSG_WAITALL | libc::MSG_NOSIGNAL;

/// One operation's length travels as an i32.
const BYTES_MAX: usize = 1 << 30;
