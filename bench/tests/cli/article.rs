//! `article`.

use std::fs;

use serde_json::Value;

use crate::harness::*;

#[test]
fn the_article_ends_with_its_claims_beside_the_figures() {
    let out = fresh_dir("article");
    // A number of requests that nobody waits for: the time ends it.
    let output = run(&[
        &["article", "--connections", "2", "--rounds", "1", "--duration", "40ms"][..],
        &["--requests", "50M", "--out", out.to_str().unwrap()],
    ]
    .concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value =
        serde_json::from_slice(&fs::read(out.join("article.json")).unwrap()).unwrap();
    let experiments = found["experiments"].as_array().unwrap();
    let counts = experiments.iter().map(|one| {
        let cells = one["cells"].as_array().unwrap();
        assert_eq!(cells.len(), 1, "{one}");
        (cells[0]["rows"].as_array().unwrap().len(), one["claims"].as_array().unwrap().len())
    });
    assert_eq!(counts.collect::<Vec<_>>(), [(2, 2), (4, 1), (5, 8)]);
    if ringpoll::capabilities().sqpoll {
        let rows = experiments.iter().flat_map(|one| one["cells"][0]["rows"].as_array().unwrap());
        rows.for_each(|row| assert_eq!(row["failure"], Value::Null, "{row}"));
        let config1 = &experiments[2]["cells"][0]["rows"][1];
        assert!(config1["summary"]["sqpoll_cpus_busy"]["median"].as_f64() > Some(0.0), "{config1}");
        assert!(config1["rounds"][0]["sqpoll_work_share"].as_f64() <= Some(1.0), "{config1}");
    }
    let limits = found["limits"].as_array().unwrap();
    assert!(limits.iter().any(|line| line.as_str().unwrap().contains("loopback")), "{limits:?}");
    let page = fs::read_to_string(out.join("article.html")).unwrap();
    let links = page.replace("http://www.w3.org/2000/svg", "");
    assert!(!links.contains("http") && !links.contains("<script") && !links.contains("{%"));
    let said = text(&output.stdout);
    for wanted in ["Experiment 3.", "sqpoll-config1", "What this host cannot show", "claims seen"] {
        assert!(said.contains(wanted), "{wanted} is not in {said}");
    }
}

#[test]
fn enough_requests_end_a_measurement_before_its_time() {
    let out = fresh_dir("counted");
    let output = run(&[
        &["article", "--connections", "2", "--rounds", "1", "--duration", "10m"][..],
        &["--requests", "20", "--out", out.to_str().unwrap()],
    ]
    .concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let found: Value =
        serde_json::from_slice(&fs::read(out.join("article.json")).unwrap()).unwrap();
    let rows = found["experiments"][2]["cells"][0]["rows"].as_array().unwrap();
    let epoll = &rows[0]["rounds"][0];
    assert!(epoll["requests"].as_u64() >= Some(20), "{epoll}");
}
