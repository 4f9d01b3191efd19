//! Files of Unix sockets: replacing a stale one, and removing one's own.
//!
//! A socket file outlives its socket. A server removes the file that it has made, and no other one
//! that has come to the same path. A server that starts may replace a file whose socket is gone;
//! of several that find the same one, one may.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::{Socket, name};
use crate::address::PeerAddr;
use crate::config;

/// The file that a listener has made. Dropping this removes it, unless the path names another file
/// by then.
pub(crate) struct SocketFile {
    /// Absolute: the process may change its directory.
    path: PathBuf,
    id: FileId,
    /// The kernel keeps the inode as long as the socket is bound to it, so no other file can have
    /// its number before this has been dropped; and nobody takes the file for a stale one.
    _socket: Arc<Socket>,
}

/// What tells one file from all others that exist at the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
}

impl SocketFile {
    /// The file at `path`, an absolute one, that binding `socket` has just made. `None`: somebody
    /// has taken it away already.
    pub(super) fn of(path: PathBuf, socket: &Arc<Socket>) -> Option<SocketFile> {
        let id = socket_at(&path)?;
        Some(SocketFile { path, id, _socket: Arc::clone(socket) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if socket_at(&self.path) == Some(self.id) {
            // It may have become impossible, for example by another mount; then the file stays.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Keeps others that start in the same directory from replacing files meanwhile. A lock on the
/// directory itself needs no file of its own, and ends with the process.
pub(super) struct DirLock(File);

impl DirLock {
    /// Waits until `until` for those that hold the lock. `None`: one of them held it all the time,
    /// or the directory cannot be locked, for example because it cannot be read.
    pub(super) fn take(path: &Path, until: Instant) -> Option<DirLock> {
        let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let mut options = OpenOptions::new();
        let options = options.read(true).custom_flags(libc::O_DIRECTORY);
        let dir = options.open(dir.unwrap_or(Path::new("."))).ok()?;
        loop {
            match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Some(DirLock(dir)),
                Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < until => {
                    thread::sleep(config::DIR_LOCK_PAUSE);
                }
                Err(_) => return None,
            }
        }
    }
}

impl Drop for DirLock {
    fn drop(&mut self) {
        // Closing the descriptor is not enough: a child process that is being started has a copy
        // of it. Unlocking what is locked does not fail.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Whether `path` is a socket file that no socket is bound to.
pub(super) fn is_stale(path: &Path) -> bool {
    // If any socket is bound to the file, connecting a datagram socket fails with EPROTOTYPE, and
    // the listener does not notice. A kernel that imitates Linux may answer ECONNREFUSED here, so a
    // stream socket has to be refused as well.
    socket_at(path).is_some()
        && refuses(path, SocketType::DGRAM)
        && refuses(path, SocketType::STREAM)
}

fn refuses(path: &Path, kind: SocketType) -> bool {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let Ok(fd) = socket_with(AddressFamily::UNIX, kind, flags, None) else { return false };
    let addr = PeerAddr::Unix(Some(path.to_owned()));
    let connected = name::connect(fd.as_fd(), &addr);
    connected.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// The socket file at `path`, if there is one.
fn socket_at(path: &Path) -> Option<FileId> {
    let found = fs::symlink_metadata(path).ok()?;
    let id = FileId { device: found.dev(), inode: found.ino() };
    found.file_type().is_socket().then_some(id)
}
