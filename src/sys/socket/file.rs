//! Socket files of Unix sockets: replacing a stale file, and removing the own file.
//!
//! A socket file outlives its socket. A server removes only the file that it made, not a later file
//! at the same path. A starting server may replace a stale file, whose socket is gone. When several
//! servers find the same stale file, a lock on the directory lets only one server replace it.

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

/// The socket file that a listener made. Dropping this removes the file, unless the path names
/// another file now.
pub(crate) struct SocketFile {
    /// Absolute: the process may change its directory.
    path: PathBuf,
    id: FileId,
    /// The bound socket keeps the inode in use, so no other file has the same inode number, and no
    /// server takes the file for a stale file.
    _socket: Arc<Socket>,
}

/// Identifies a file among all existing files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
}

impl SocketFile {
    /// The file that binding `socket` made at the absolute `path`. `None`: the file is gone.
    pub(super) fn of(path: PathBuf, socket: &Arc<Socket>) -> Option<SocketFile> {
        let id = socket_at(&path)?;
        Some(SocketFile { path, id, _socket: Arc::clone(socket) })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if socket_at(&self.path) == Some(self.id) {
            // Removing can fail, for example on a mount that became read-only. The file then stays.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// A lock on a directory: only its holder may replace stale socket files there. A lock on the
/// directory itself needs no lock file, and ends with the process.
pub(super) struct DirLock(File);

impl DirLock {
    /// Waits for the lock until `until`. `None`: another process held the lock all the time, or the
    /// directory cannot be locked, for example because this process may not read it.
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
        // Closing the descriptor is not enough: a child process between fork and exec has a copy of
        // the descriptor. Unlocking a held lock does not fail.
        let _ = flock(&self.0, FlockOperation::Unlock);
    }
}

/// Whether `path` is a socket file that no socket is bound to.
pub(super) fn is_stale(path: &Path) -> bool {
    // While a stream socket is bound to the file, connecting a datagram socket fails with
    // EPROTOTYPE, and the listener does not notice the attempt. A kernel that imitates Linux may
    // return ECONNREFUSED in that case, so a stream socket must be refused too.
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

/// The socket file at `path`. `None`: there is no file, or another kind of file.
fn socket_at(path: &Path) -> Option<FileId> {
    let found = fs::symlink_metadata(path).ok()?;
    let id = FileId { device: found.dev(), inode: found.ino() };
    found.file_type().is_socket().then_some(id)
}
