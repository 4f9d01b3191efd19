//! Claims about the state of a pool, with numbers in place of connections.

use super::*;
use crate::rpc::Pool;
use crate::task::tests::CountsWakes;

const ADDRESS: &str = "a:1";

/// A state, its settings, and the fitness of every connection.
struct Desk {
    state: State<u32>,
    settings: Settings,
    fitness: Fitness,
}

impl Desk {
    fn new(connections_max: usize, idle_max: usize, idle_min: usize) -> Desk {
        let builder = Pool::builder().connections_max(connections_max);
        let settings = builder.idle_max(idle_max).idle_min(idle_min).settings();
        Desk { state: State::new(), settings, fitness: Fitness::Fit }
    }

    fn enter(&mut self, ticket: &mut Option<u64>) -> (Entered<u32>, After<u32>) {
        let waker = Some(Waker::noop().clone());
        let fitness = self.fitness;
        let (entered, after, _) =
            self.state.enter(&self.settings, ADDRESS, ticket, waker, |_| fitness);
        (entered, after)
    }

    /// A caller that gets a place to dial at.
    #[track_caller]
    fn dials(&mut self, ticket: &mut Option<u64>) {
        let (entered, after) = self.enter(ticket);
        assert!(matches!(entered, Entered::Dial(_)) && after.closes.is_empty());
    }

    /// A caller that dials and gets its connection.
    #[track_caller]
    fn connects(&mut self) {
        self.dials(&mut None);
        assert!(self.state.dialed(ADDRESS));
    }

    /// A caller that has to wait; its ticket.
    #[track_caller]
    fn waits(&mut self) -> Option<u64> {
        let mut ticket = None;
        assert!(matches!(self.enter(&mut ticket).0, Entered::Waits));
        assert!(ticket.is_some());
        ticket
    }

    /// A caller that gets this idle connection.
    #[track_caller]
    fn gets(&mut self, ticket: &mut Option<u64>, connection: u32) {
        match self.enter(ticket).0 {
            Entered::Idle(_, idle) => assert_eq!(idle, connection),
            _ => panic!("no idle connection"),
        }
    }

    #[track_caller]
    fn gives_back(&mut self, connection: u32) -> After<u32> {
        self.state.give_back(&self.settings, ADDRESS, Held::Out, connection).expect("it is kept")
    }

    fn releases(&mut self, held: Held) -> After<u32> {
        self.state.release(&self.settings, ADDRESS, held, 1)
    }

    fn leaves(&mut self, ticket: Option<u64>) -> After<u32> {
        self.state.leave(&self.settings, ADDRESS, ticket.expect("it waits")).0
    }
}

#[test]
fn places_are_given_out_in_order_and_no_more_than_there_are() {
    let mut desk = Desk::new(2, 2, 0);
    desk.connects();
    desk.dials(&mut None);
    let (mut first, mut second) = (desk.waits(), desk.waits());
    // A dial that fails frees its place, and the next caller dials.
    assert_eq!(desk.releases(Held::Dialing).wakes.len(), 1);
    assert!(matches!(desk.enter(&mut second).0, Entered::Waits), "out of turn");
    desk.waits();
    desk.dials(&mut first);
    assert_eq!(desk.gives_back(7).wakes.len(), 1);
    desk.waits();
    desk.gets(&mut second, 7);
    assert_eq!((first, second), (None, None));
}

#[test]
fn the_connection_that_was_given_back_last_is_used_first() {
    let mut desk = Desk::new(3, 3, 0);
    for _ in 0..3 {
        desk.connects();
    }
    for connection in [1, 2, 3] {
        let after = desk.gives_back(connection);
        assert_eq!(after.starts_keeper, connection == 1);
    }
    for connection in [3, 2, 1] {
        desk.gets(&mut None, connection);
    }
}

#[test]
fn a_place_that_was_granted_and_never_taken_is_passed_on() {
    let mut desk = Desk::new(1, 1, 0);
    desk.connects();
    let (first, second, mut third) = (desk.waits(), desk.waits(), desk.waits());
    assert_eq!(desk.gives_back(7).wakes.len(), 1);
    // Leaves the line without a grant: nobody's turn changes.
    assert!(desk.leaves(second).wakes.is_empty());
    assert_eq!(desk.leaves(first).wakes.len(), 1);
    desk.gets(&mut third, 7);
}

#[test]
fn a_connection_for_a_caller_is_not_idle_until_the_caller_leaves() {
    let mut desk = Desk::new(1, 0, 0);
    desk.connects();
    let (mut first, second) = (desk.waits(), desk.waits());
    assert!(desk.gives_back(7).closes.is_empty());
    desk.gets(&mut first, 7);
    assert!(desk.gives_back(8).closes.is_empty());
    assert_eq!(desk.leaves(second).closes, [8], "more idle connections than allowed");
    assert_eq!(desk.state.open(), 1, "it counts until it is closed");
    assert_eq!(desk.releases(Held::Closing).wakes.len(), 0);
    desk.connects();
    assert_eq!(
        desk.state.give_back(&desk.settings, ADDRESS, Held::Out, 9).err(),
        Some(9),
        "nobody waits for it"
    );
}

#[test]
fn unfit_connections_are_closed_before_others_take_their_places() {
    let mut desk = Desk::new(2, 2, 0);
    desk.connects();
    desk.connects();
    drop((desk.gives_back(1), desk.gives_back(2)));
    desk.fitness = Fitness::Dead;
    let (entered, after) = desk.enter(&mut None);
    assert!(matches!(entered, Entered::Dial(_)));
    assert_eq!(after.closes, [2, 1]);
    // The caller's own place and two connections that are being closed.
    let mut waits = desk.waits();
    assert!(desk.releases(Held::Closing).wakes.is_empty());
    assert_eq!(desk.releases(Held::Closing).wakes.len(), 1);
    desk.dials(&mut waits);
    assert_eq!(desk.state.stats().dead, 2);
}

#[test]
fn a_closed_pool_grants_nothing_and_is_emptied_by_its_last_place() {
    let mut desk = Desk::new(2, 2, 2);
    desk.connects();
    desk.connects();
    let waits = desk.waits();
    drop(desk.gives_back(1));
    let closes = desk.state.close();
    assert_eq!(closes.iter().map(|(_, closes)| closes.clone()).collect::<Vec<_>>(), [[1]]);
    assert!(matches!(desk.enter(&mut None).0, Entered::Closed));
    assert_eq!(desk.state.give_back(&desk.settings, ADDRESS, Held::Out, 2).err(), Some(2));
    let after = desk.releases(Held::Out);
    assert!(after.wakes.is_empty() && !after.is_emptied);
    assert!(desk.releases(Held::Closing).is_emptied);
    drop(desk.leaves(waits));
    assert_eq!(desk.state.stats().addresses, 0);
}

#[test]
fn an_address_is_forgotten_with_its_last_place_or_caller() {
    let mut desk = Desk::new(1, 1, 0);
    desk.dials(&mut None);
    let waits = desk.waits();
    drop(desk.releases(Held::Dialing));
    assert_eq!(desk.state.stats().addresses, 1, "a caller has the place");
    drop(desk.leaves(waits));
    assert_eq!(desk.state.stats().addresses, 0);
    desk.connects();
    drop(desk.gives_back(1));
    assert_eq!(desk.state.cool(ADDRESS), [1]);
    assert_eq!(desk.state.stats().addresses, 1);
    drop(desk.releases(Held::Closing));
    assert_eq!(desk.state.stats().addresses, 0);
}

#[test]
fn the_warm_minimum_is_dialled_within_the_bounds_and_given_up_after_failures() {
    let mut desk = Desk::new(4, 4, 3);
    let warming =
        |desk: &mut Desk, now_ns| desk.state.start_warming(&desk.settings, ADDRESS, now_ns);
    assert_eq!(warming(&mut desk, 0), 0, "not used yet");
    assert!(desk.state.warm(ADDRESS) && !desk.state.warm(ADDRESS));
    desk.connects();
    desk.connects();
    // Three are missing, and there is room for two.
    assert_eq!((warming(&mut desk, 0), warming(&mut desk, 0)), (2, 0));
    let given = desk.state.give_back(&desk.settings, ADDRESS, Held::Warming, 1);
    assert!(given.is_ok_and(|after| after.closes.is_empty()));
    for failures in 1..=3 {
        desk.state.warming_failed(ADDRESS, 4, |count| 100 * u64::from(count));
        drop(desk.releases(Held::Warming));
        assert_eq!(warming(&mut desk, 100 * failures - 1), 0, "too early");
        assert_eq!(warming(&mut desk, 100 * failures), 1);
    }
    desk.state.warming_failed(ADDRESS, 4, |_| 0);
    drop(desk.releases(Held::Warming));
    assert_eq!(warming(&mut desk, 1000), 0, "given up");
    desk.gets(&mut None, 1);
    assert_eq!(warming(&mut desk, 1000), 1, "used again");
}

#[test]
fn the_keeper_wakes_for_the_first_end_and_ends_when_there_is_nothing_to_keep() {
    let mut desk = Desk::new(3, 3, 0);
    desk.connects();
    desk.connects();
    drop((desk.gives_back(30), desk.gives_back(20)));
    let ends = |connection: &u32| u64::from(*connection);
    assert_eq!(desk.state.next_visit(100, ends), Some(20));
    assert_eq!(desk.state.next_visit(10, ends), Some(10));
    let fitness = |connection: &u32| match connection {
        20 => Fitness::Expired,
        _ => Fitness::Fit,
    };
    assert_eq!(desk.state.take_unfit(ADDRESS, 5, fitness), [20]);
    drop(desk.releases(Held::Closing));
    desk.gets(&mut None, 30);
    assert_eq!(desk.state.next_visit(100, ends), None);
    assert!(desk.gives_back(30).starts_keeper, "the next idle connection needs a keeper");
}

#[test]
fn the_newest_waker_of_a_caller_is_called() {
    let mut desk = Desk::new(1, 1, 0);
    desk.connects();
    let (old, new, mut ticket) = (CountsWakes::new(), CountsWakes::new(), None);
    for waker in [old.waker(), new.waker()] {
        let waker = Some(waker);
        drop(desk.state.enter(&desk.settings, ADDRESS, &mut ticket, waker, |_| Fitness::Fit));
    }
    desk.releases(Held::Out).wakes.into_iter().for_each(Waker::wake);
    assert_eq!((old.count(), new.count()), (0, 1));
}
