//! What the host says about this process: fds, threads, memory, limits.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Every open fd and what it points to.
pub(crate) fn fds() -> BTreeMap<i32, String> {
    let listing = fs::read_dir("/proc/self/fd").expect("proc is mounted");
    let mut fds = BTreeMap::new();
    for entry in listing.flatten() {
        // One that another thread closes while we look has no target any more.
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let target = target.display().to_string();
        // The listing's own fd is open only while we look.
        if target.starts_with("/proc/") {
            continue;
        }
        if let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse().ok()) {
            fds.insert(fd, target);
        }
    }
    fds
}

/// How many threads this process has, without those that end when it suits them: the kernel's, and
/// idle ones for synchronous code.
pub(crate) fn thread_count() -> usize {
    let is_ours = |name: &String| !name.starts_with("iou-") && !name.starts_with("ringpoll-b");
    thread_names().filter(is_ours).count()
}

/// How many threads there are for synchronous code.
pub(crate) fn unblock_thread_count() -> usize {
    thread_names().filter(|name| name.starts_with("ringpoll-b")).count()
}

fn thread_names() -> impl Iterator<Item = String> {
    let tasks = fs::read_dir("/proc/self/task").expect("proc is mounted").flatten();
    tasks.map(|task| fs::read_to_string(task.path().join("comm")).unwrap_or_default())
}

/// One line per thread: id, name, and where it waits in the kernel.
pub(crate) fn threads() -> String {
    let mut text = String::new();
    for entry in fs::read_dir("/proc/self/task").expect("proc is mounted").flatten() {
        let read = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
        let id = entry.file_name().into_string().unwrap_or_default();
        text += &format!("  {id} {} {}\n", read("comm").trim(), read("wchan").trim());
    }
    text
}

/// Resident memory of this process.
pub(crate) fn rss_bytes() -> usize {
    let status = fs::read_to_string("/proc/self/status").expect("proc is mounted");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|rest| rest.split_whitespace().next()?.parse::<usize>().ok());
    kilobytes.expect("status has a resident size") * 1024
}

/// CPU time this process has used, in clock ticks (user and system).
pub(crate) fn cpu_ticks() -> u64 {
    let stat = fs::read_to_string("/proc/self/stat").expect("proc is mounted");
    // Fields 14 and 15; the second field is a name in brackets and may hold spaces.
    let rest = stat.rsplit(')').next().expect("stat has a name");
    rest.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum()
}

/// Lifts the soft fd limit to the hard one: both ends of every connection live in this process.
pub(crate) fn raise_fd_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    // A host that refuses keeps its limit, and the tests that need more say so.
    let _ = setrlimit(Resource::Nofile, raised);
}

/// Prints past libtest's capture, so that it shows for a passing test as well.
pub(crate) fn say(line: &str) {
    // A closed stderr is no reason to fail a test.
    let _ = writeln!(io::stderr(), "{line}");
}
