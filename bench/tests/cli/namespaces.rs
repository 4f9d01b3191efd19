//! `article --namespaces`.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use rustix::process::{Pid, Signal, geteuid, kill_process};
use serde_json::Value;

use crate::harness::*;

/// One round that proves nothing but that it works.
const SHORT: [&str; 6] = ["--connections", "2", "--rounds", "1", "--duration", "30ms"];

#[test]
fn namespaces_are_for_root_with_the_command_ip() {
    let args = ["article", "--namespaces"];
    let mut program = program();
    program.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    if geteuid().is_root() {
        let output = run_with(&args, &[("PATH", "/nowhere")]);
        check_refused(&output, "the command ip is missing");
        // Nobody.
        program.uid(65_534);
    }
    match program.output() {
        Ok(output) => check_refused(&output, "only root"),
        Err(error) => println!("left out: nobody may not run this program: {error}"),
    }
}

#[test]
fn two_namespaces_carry_an_article_and_leave_nothing_behind() {
    if let Some(why) = no_namespaces() {
        return println!("left out: {why}");
    }
    let out = fresh_dir("article-namespaces");
    let stale = format!("ringpoll-{}-server", ended_process());
    assert!(ip(&["netns", "add", &stale]).status.success());
    let args = [&["article", "--namespaces", "--out", out.to_str().unwrap()][..], &SHORT].concat();
    let output = run(&args);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found = article_report(&out);
    assert_eq!(found["settings"]["network"], "veth");
    for row in article_rows(&found) {
        let name = row["candidate"].as_str().unwrap();
        let wants_sqpoll = name.contains("uring-") || name.contains("sqpoll");
        if ringpoll::capabilities().sqpoll || !wants_sqpoll {
            assert_eq!(row["failure"], Value::Null, "{row}");
        }
    }
    let limits = found["limits"].to_string();
    assert!(limits.contains("veth pair") && !limits.contains("loopback"), "{limits}");
    let names = text(&ip(&["netns", "list"]).stdout);
    assert!(!names.contains(&stale), "a name of a process that is gone stays: {names}");
}

#[test]
fn namespaces_end_with_the_process_that_made_them() {
    if let Some(why) = no_namespaces() {
        return println!("left out: {why}");
    }
    for signal in [Signal::TERM, Signal::KILL] {
        let out = fresh_dir("article-killed");
        let args = ["article", "--namespaces", "--duration", "10m", "--out"];
        let mut article = program();
        article.args(args).arg(&out).stdout(Stdio::null()).stderr(Stdio::null());
        let mut article = Guard(article.spawn().unwrap());
        let pid = article.0.id();
        let server = until(|| children(pid).into_iter().find(|child| has_started(*child)));
        // While it starts a server it is where the servers are.
        until(|| {
            let [own, client, of_server] = [std::process::id(), pid, server].map(network_of);
            (own != client && client != of_server && own != of_server).then_some(())
        });
        kill_process(Pid::from_child(&article.0), signal).unwrap();
        wait(&mut article.0).unwrap_or_else(|| panic!("{signal:?} does not end it"));
        until(|| (!Path::new(&format!("/proc/{server}/exe")).exists()).then_some(()));
        let names = text(&ip(&["netns", "list"]).stdout);
        assert!(!names.contains(&format!("ringpoll-{pid}-")), "{signal:?}: {names}");
    }
}

#[test]
fn an_interrupt_while_namespaces_are_made_leaves_no_names() {
    if let Some(why) = no_namespaces() {
        return println!("left out: {why}");
    }
    let out = fresh_dir("article-early");
    for _ in 0..5 {
        let mut article = program();
        article.args(["article", "--namespaces", "--duration", "10m", "--out"]).arg(&out);
        let mut article =
            Guard(article.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let pid = article.0.id();
        let name = format!("ringpoll-{pid}-");
        let has_names = || text(&ip(&["netns", "list"]).stdout).contains(&name);
        // It may be done with it before anybody sees that it has begun.
        let is_serving = || children(pid).into_iter().any(has_started);
        until(|| (has_names() || is_serving()).then_some(()));
        kill_process(Pid::from_child(&article.0), Signal::TERM).unwrap();
        let status = wait(&mut article.0).expect("a signal ends it");
        assert_eq!(status.code(), Some(130));
        assert!(!has_names());
    }
}

/// Why namespaces cannot be tried here.
fn no_namespaces() -> Option<String> {
    if !geteuid().is_root() {
        return Some("not root".to_owned());
    }
    // Not by ours: what is to be found out is whether ours works.
    let name = format!("ringpoll-test-{}-{:?}", std::process::id(), std::thread::current().id());
    let name = name.replace(['(', ')'], "");
    let made = Command::new("ip").args(["netns", "add", &name]).output();
    match made {
        Err(error) => Some(format!("ip: {error}")),
        Ok(output) if !output.status.success() => Some(text(&output.stderr)),
        Ok(_) => {
            assert!(ip(&["netns", "del", &name]).status.success());
            None
        }
    }
}

fn ip(args: &[&str]) -> Output {
    Command::new("ip").args(args).output().unwrap()
}

/// The number of a process that has ended.
fn ended_process() -> u32 {
    let mut child = program().arg("--version").stdout(Stdio::null()).spawn().unwrap();
    child.wait().unwrap();
    child.id()
}

fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|child| child.parse().unwrap()).collect()
}

/// Whether a child is a server already: before, it may be `ip`.
fn has_started(pid: u32) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).nth(1) == Some(b"serve")
}

fn network_of(pid: u32) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/ns/net")).unwrap()
}

fn check_refused(output: &Output, why: &str) {
    let error = text(&output.stderr);
    assert_eq!((output.status.code(), error.lines().count()), (Some(2), 1), "{error}");
    assert!(error.contains(why) && output.stdout.is_empty(), "{error}");
}

/// A process that does not outlive its test.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // Both fail only for a process that has ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
