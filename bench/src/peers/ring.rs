//! An io_uring and one group of receive buffers: what `bare_ring` needs of the kernel, behind safe
//! calls.
//!
//! The only unsafe code of this program. Neither the ring nor its receive buffers are ever freed:
//! the process ends with them. Bytes on their way out belong to the ring until the kernel has
//! posted the send's completion; a received buffer is a [`Filled`] until it is given back.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use io_uring::squeue::{Entry, Flags};
use io_uring::{CompletionQueue, IoUring, SubmissionQueue, Submitter, cqueue, opcode, types};
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};

/// A ring for one thread, whose completions come only when it asks for them.
pub(super) struct Ring {
    submitter: Submitter<'static>,
    submissions: SubmissionQueue<'static>,
    completions: CompletionQueue<'static>,
    buffers: Buffers,
    /// What each slot is sending.
    in_flight: Vec<Option<Vec<u8>>>,
    /// How many descriptors the ring's own table holds; 0 is to use the process' descriptors.
    direct_files: u32,
    pub(super) system_calls: u64,
}

/// An accepted connection, in the process' table of descriptors or in the ring's.
pub(super) enum File {
    Owned(OwnedFd),
    Direct(u32),
}

/// A receive buffer and how many bytes the kernel has put into it.
pub(super) struct Filled {
    index: u16,
    bytes: usize,
}

/// What the kernel reports. `more`: the operation goes on by itself.
pub(super) enum Completion {
    Accepted {
        outcome: io::Result<File>,
        more: bool,
    },
    /// Without a buffer, the peer has said its last word.
    Received {
        slot: usize,
        outcome: io::Result<Option<Filled>>,
        more: bool,
    },
    Sent {
        slot: usize,
        outcome: io::Result<usize>,
        bytes: Vec<u8>,
    },
    Stopped,
    /// The end of an operation nobody waits for.
    Nothing,
}

impl Ring {
    /// With `count` receive buffers of `bytes` each; `count` is a power of two.
    pub(super) fn new(count: u16, bytes: usize, direct_files: u32) -> io::Result<Ring> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_no_sqarray()
            .setup_cqsize(COMPLETIONS)
            .build(SUBMISSIONS)?;
        let (mut submitter, submissions, completions) = Box::leak(Box::new(ring)).split();
        // Saves looking up the descriptor with each call. Splitting the ring again would lose it.
        submitter.register_ring_fd()?;
        if direct_files > 0 {
            submitter.register_files_sparse(direct_files)?;
        }
        let buffers = Buffers::register(&submitter, count, bytes)?;
        let in_flight = Vec::new();
        let system_calls = 3;
        Ok(Ring {
            submitter,
            submissions,
            completions,
            buffers,
            in_flight,
            direct_files,
            system_calls,
        })
    }

    /// Hands over what was pushed and waits for a completion, in one system call.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        self.enter(1)
    }

    /// The next completion that is there.
    pub(super) fn next(&mut self) -> Option<Completion> {
        let entry = self.completions.next()?;
        let slot = (entry.user_data() >> OP_BITS) as usize;
        let more = cqueue::more(entry.flags());
        let outcome = match u32::try_from(entry.result()) {
            Ok(value) => Ok(value),
            Err(_) => Err(io::Error::from_raw_os_error(-entry.result())),
        };
        Some(match entry.user_data() & OP_MASK {
            ACCEPT => Completion::Accepted { outcome: outcome.map(|value| self.own(value)), more },
            RECEIVE => {
                let filled = self.filled(cqueue::buffer_select(entry.flags()), &outcome);
                Completion::Received { slot, outcome: outcome.map(|_| filled), more }
            }
            SEND => {
                let bytes = self.in_flight[slot].take().expect("a send completes once");
                Completion::Sent { slot, outcome: outcome.map(|value| value as usize), bytes }
            }
            STOP => Completion::Stopped,
            _ => Completion::Nothing,
        })
    }

    /// Accepts until the kernel says that it no longer does. A descriptor that does not block is
    /// not waited for, so the listener must.
    pub(super) fn accept(&mut self, listener: &TcpListener) -> io::Result<()> {
        let direct = self.direct_files > 0;
        // The ring's own table is never inherited, and the kernel refuses the flag there.
        let flags = if direct { 0 } else { SocketFlags::CLOEXEC.bits() as i32 };
        let accept = opcode::AcceptMulti::new(types::Fd(listener.as_raw_fd()));
        self.push(accept.allocate_file_index(direct).flags(flags).build().user_data(ACCEPT))
    }

    /// Receives into buffers of the ring's choice until the kernel says that it no longer does.
    pub(super) fn receive(&mut self, slot: usize, file: &File) -> io::Result<()> {
        let (number, flags) = file.target();
        let receive = opcode::RecvMulti::new(types::Fd(number), GROUP).build();
        self.push(receive.flags(flags).user_data(user_data(RECEIVE, slot)))
    }

    /// Sends `bytes` from `from` on. They come back with the completion; until then the slot sends
    /// nothing else.
    pub(super) fn send(
        &mut self,
        slot: usize,
        file: &File,
        bytes: Vec<u8>,
        from: usize,
    ) -> io::Result<()> {
        let (number, flags) = file.target();
        let unsent = &bytes[from..];
        let send = opcode::Send::new(types::Fd(number), unsent.as_ptr(), unsent.len() as u32)
            // The kernel goes on after a short send, so that a short count is a failure.
            .flags((SendFlags::NOSIGNAL.bits() | RecvFlags::WAITALL.bits()) as i32)
            .build();
        if self.in_flight.len() <= slot {
            self.in_flight.resize_with(slot + 1, || None);
        }
        assert!(self.in_flight[slot].is_none(), "slot {slot} sends already");
        self.in_flight[slot] = Some(bytes);
        self.push(send.flags(flags).user_data(user_data(SEND, slot)))
    }

    /// Ends what the slot receives; that it has ended is told by its completion.
    pub(super) fn cancel_receive(&mut self, slot: usize) -> io::Result<()> {
        self.push(opcode::AsyncCancel::new(user_data(RECEIVE, slot)).build().user_data(NOTHING))
    }

    /// Ends what the slot sends; that it has ended is told by its completion.
    pub(super) fn cancel_send(&mut self, slot: usize) -> io::Result<()> {
        self.push(opcode::AsyncCancel::new(user_data(SEND, slot)).build().user_data(NOTHING))
    }

    /// Closes a connection that no operation names any more.
    pub(super) fn close(&mut self, file: File) -> io::Result<()> {
        match file {
            File::Owned(fd) => {
                self.system_calls += 1;
                drop(fd);
                Ok(())
            }
            File::Direct(index) => {
                self.push(opcode::Close::new(types::Fixed(index)).build().user_data(NOTHING))
            }
        }
    }

    /// Reports [`Completion::Stopped`] once there is something to read.
    pub(super) fn watch(&mut self, stop: impl AsFd) -> io::Result<()> {
        let fd = types::Fd(stop.as_fd().as_raw_fd());
        let poll = opcode::PollAdd::new(fd, PollFlags::IN.bits().into());
        self.push(poll.build().user_data(STOP))
    }

    /// The bytes in a buffer.
    pub(super) fn bytes(&self, filled: &Filled) -> &[u8] {
        let start = usize::from(filled.index) * self.buffers.bytes;
        // SAFETY: the kernel reported this buffer and does not write to it until `give_back`, which
        // takes `filled`. The memory is never freed, and the offset lies in it: `filled` is made in
        // `filled()` only, which checks both numbers.
        let at = unsafe { self.buffers.memory.add(start) };
        // SAFETY: as above; `register` has initialized the memory.
        unsafe { std::slice::from_raw_parts(at, filled.bytes) }
    }

    /// Lets the kernel fill a buffer again, from the next call into it on.
    pub(super) fn give_back(&mut self, filled: Filled) {
        self.buffers.offer(filled.index);
    }

    fn own(&self, value: u32) -> File {
        if self.direct_files > 0 {
            return File::Direct(value);
        }
        // SAFETY: the kernel has just installed this descriptor for the accept that reports it, and
        // each completion is taken once.
        File::Owned(unsafe { OwnedFd::from_raw_fd(value as RawFd) })
    }

    /// The buffer of a completion. One without bytes goes back at once.
    fn filled(&mut self, index: Option<u16>, outcome: &io::Result<u32>) -> Option<Filled> {
        let index = index?;
        let bytes = outcome.as_ref().map_or(0, |bytes| *bytes as usize);
        assert!(index < self.buffers.count && bytes <= self.buffers.bytes, "{index}: {bytes}");
        if bytes == 0 {
            self.buffers.offer(index);
            return None;
        }
        Some(Filled { index, bytes })
    }

    fn push(&mut self, entry: Entry) -> io::Result<()> {
        loop {
            // SAFETY: an entry names no memory but the bytes of a send, which `in_flight` keeps
            // until that send's completion, and the ring's buffers, which are never freed.
            if unsafe { self.submissions.push(&entry) }.is_ok() {
                return Ok(());
            }
            self.enter(0)?;
        }
    }

    fn enter(&mut self, wanted: usize) -> io::Result<()> {
        // First the buffers: an operation that is armed may ask for one at once.
        self.buffers.publish();
        self.submissions.sync();
        // What was taken counts as waiting until the queue's head says so, and ends the wait at
        // once.
        self.completions.sync();
        self.system_calls += 1;
        let entered = self.submitter.submit_and_wait(wanted);
        self.submissions.sync();
        self.completions.sync();
        match entered {
            Ok(_) => Ok(()),
            // The call is made again with the next turn of the loop: a signal, memory that was
            // short, a completion queue that must be read first.
            Err(error) => match Errno::from_io_error(&error) {
                Some(Errno::INTR | Errno::AGAIN | Errno::BUSY) => Ok(()),
                _ => Err(error),
            },
        }
    }
}

impl File {
    /// How an operation names it.
    fn target(&self) -> (RawFd, Flags) {
        match self {
            File::Owned(fd) => (fd.as_raw_fd(), Flags::empty()),
            File::Direct(index) => (*index as RawFd, Flags::FIXED_FILE),
        }
    }
}

/// The receive buffers and the queue through which the kernel gets them.
struct Buffers {
    memory: *mut u8,
    /// Of one buffer.
    bytes: usize,
    count: u16,
    queue: &'static [Page],
    /// How many buffers were ever offered.
    tail: u16,
}

/// One entry of the queue (`struct io_uring_buf`); the first one's `tail` is the queue's.
#[repr(C, align(16))]
#[derive(Default)]
struct Offer {
    addr: AtomicU64,
    len: AtomicU32,
    index: AtomicU16,
    tail: AtomicU16,
}

/// The kernel wants the queue aligned to a page.
#[repr(C, align(4096))]
struct Page([Offer; OFFERS_PER_PAGE]);

impl Buffers {
    fn register(submitter: &Submitter<'_>, count: u16, bytes: usize) -> io::Result<Buffers> {
        assert!(count.is_power_of_two(), "{count} buffers");
        let pages = (0..usize::from(count).div_ceil(OFFERS_PER_PAGE))
            .map(|_| Page(std::array::from_fn(|_| Offer::default())));
        let queue: &'static [Page] = pages.collect::<Vec<_>>().leak();
        // Not zeroes, which the system would hand out when they are first touched: what a server
        // takes once must not look like the price of its connections.
        let memory = vec![1; usize::from(count) * bytes].leak().as_mut_ptr();
        // SAFETY: the queue is never freed, is aligned to a page and has `count` entries at least.
        unsafe {
            submitter.register_buf_ring_with_flags(
                queue.as_ptr().expose_provenance() as u64,
                count,
                GROUP,
                0,
            )
        }?;
        let mut buffers = Buffers { memory, bytes, count, queue, tail: 0 };
        (0..count).for_each(|index| buffers.offer(index));
        Ok(buffers)
    }

    fn offer(&mut self, index: u16) {
        let at = usize::from(self.tail & (self.count - 1));
        let offer = &self.queue[at / OFFERS_PER_PAGE].0[at % OFFERS_PER_PAGE];
        let addr = self.memory.expose_provenance() + usize::from(index) * self.bytes;
        offer.addr.store(addr as u64, Ordering::Relaxed);
        offer.len.store(self.bytes as u32, Ordering::Relaxed);
        offer.index.store(index, Ordering::Relaxed);
        self.tail = self.tail.wrapping_add(1);
    }

    fn publish(&self) {
        self.queue[0].0[0].tail.store(self.tail, Ordering::Release);
    }
}

fn user_data(op: u64, slot: usize) -> u64 {
    (slot as u64) << OP_BITS | op
}

const OP_BITS: u32 = 3;
const OP_MASK: u64 = (1 << OP_BITS) - 1;
const NOTHING: u64 = 0;
const ACCEPT: u64 = 1;
const RECEIVE: u64 = 2;
const SEND: u64 = 3;
const STOP: u64 = 4;

/// The one group of buffers.
const GROUP: u16 = 0;
const OFFERS_PER_PAGE: usize = 4096 / size_of::<Offer>();
const SUBMISSIONS: u32 = 256;
/// A receive and a send for each of 2000 connections; beyond that the kernel keeps a list.
const COMPLETIONS: u32 = 4096;

const _: () = assert!(size_of::<Offer>() == 16, "the kernel's layout");
