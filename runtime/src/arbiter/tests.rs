use std::time::Duration;

use super::*;

const NOW: Stamp = Stamp(1);
const LEFT: Source = Source::literal("left");
const RIGHT: Source = Source::literal("right");
const BOSS: Source = Source::literal("boss");
const LEASE: Duration = Duration::from_millis(300);

fn arbiter(resume: Resume) -> Arbiter {
    let operators = Operators::new([BOSS, LEFT]);
    let mut arbiter = Arbiter::new(ArbiterConfig { resume, operators, ..ArbiterConfig::default() });
    arbiter.on_state(true, NOW);
    arbiter
}

fn claim(mode: LeaseMode, priority: u8) -> AuthorityRequest {
    AuthorityRequest::Take(Claim { mode, priority, duration: LEASE })
}

fn ask(arbiter: &mut Arbiter, request: AuthorityRequest, who: Source) -> Authority {
    let _ = arbiter.on_request(request, who, NOW);
    arbiter.authority()
}

#[test]
fn nobody_moves_an_arm_whose_state_is_unknown() {
    let mut arbiter = Arbiter::default();
    let policy = |a: &mut Arbiter| a.on_request(AuthorityRequest::Policy, Source::RUN, NOW);
    assert_eq!(policy(&mut arbiter), Err(Denied::StateStale));
    arbiter.on_state(true, NOW);
    assert!(policy(&mut arbiter).is_ok_and(|c| c.is_some()));
    let change = arbiter.on_state(false, NOW);
    assert_eq!(change.map(|c| (c.to, c.reason)), Some((Authority::Hold, Reason::StateStale)));
    arbiter.on_state(true, NOW);
    assert_eq!(arbiter.authority(), Authority::Hold, "authority does not return by itself");
    assert_eq!(policy(&mut arbiter), Err(Denied::ConsentMissing));
}

#[test]
fn stop_is_latched_until_an_operator_resets_and_motion_needs_a_second_word() {
    for resume in [Resume::Ask, Resume::Auto] {
        let mut arbiter = arbiter(resume);
        ask(&mut arbiter, AuthorityRequest::Policy, Source::RUN);
        assert_eq!(ask(&mut arbiter, AuthorityRequest::Stop, RIGHT), Authority::Stop);
        for request in [
            AuthorityRequest::Policy,
            AuthorityRequest::Motion,
            AuthorityRequest::Hold,
            AuthorityRequest::PolicyLost,
            claim(LeaseMode::Teleop, 255),
        ] {
            for who in [Source::RUN, BOSS, RIGHT] {
                assert_eq!(arbiter.on_request(request, who, NOW), Err(Denied::Stopped));
            }
        }
        for who in [Source::RUN, RIGHT] {
            let denied = Err(Denied::NotAnOperator);
            assert_eq!(arbiter.on_request(AuthorityRequest::Reset, who, NOW), denied);
        }
        assert_eq!(ask(&mut arbiter, AuthorityRequest::Reset, BOSS), Authority::Hold);
        assert_eq!(ask(&mut arbiter, AuthorityRequest::Policy, Source::RUN), Authority::Hold);
        assert_eq!(ask(&mut arbiter, AuthorityRequest::Policy, BOSS), Authority::Policy);
    }
}

#[test]
fn a_lease_lives_by_its_samples_and_ends_in_a_hold() {
    let mut arbiter = arbiter(Resume::Ask);
    ask(&mut arbiter, AuthorityRequest::Policy, Source::RUN);
    assert_eq!(ask(&mut arbiter, claim(LeaseMode::Teleop, 1), LEFT), Authority::Teleop);
    assert!(!arbiter.on_sample(RIGHT, NOW), "another device's sample renews nothing");
    assert!(arbiter.on_sample(LEFT, NOW + LEASE));
    assert_eq!(arbiter.on_time(NOW + LEASE * 2), None);
    let change = arbiter.on_time(NOW + LEASE * 2 + Duration::from_nanos(1)).expect("it expired");
    assert_eq!(
        (change.to, change.reason, change.by),
        (Authority::Hold, Reason::LeaseExpired, LEFT)
    );
    assert!(change.awaits_consent);
    assert_eq!(ask(&mut arbiter, AuthorityRequest::Policy, Source::RUN), Authority::Hold);
}

#[test]
fn the_policy_returns_by_itself_only_where_configured_and_only_if_it_was_interrupted() {
    let mut arbiter = arbiter(Resume::Auto);
    ask(&mut arbiter, claim(LeaseMode::Teleop, 1), LEFT);
    let release = AuthorityRequest::Release { to_policy: false };
    assert_eq!(ask(&mut arbiter, release, LEFT), Authority::Hold, "nothing was interrupted");
    ask(&mut arbiter, AuthorityRequest::Policy, Source::RUN);
    ask(&mut arbiter, claim(LeaseMode::Teleop, 1), LEFT);
    assert_eq!(ask(&mut arbiter, release, LEFT), Authority::Policy);
    ask(&mut arbiter, claim(LeaseMode::Teleop, 1), LEFT);
    assert_eq!(ask(&mut arbiter, AuthorityRequest::Hold, RIGHT), Authority::Hold);
    let run = arbiter.on_request(AuthorityRequest::Policy, Source::RUN, NOW);
    assert_eq!(run, Err(Denied::ConsentMissing), "a person's hold is not undone by the run");
}

#[test]
fn one_of_two_devices_holds_the_arm() {
    let mut arbiter = arbiter(Resume::Ask);
    assert_eq!(ask(&mut arbiter, claim(LeaseMode::Teleop, 5), LEFT), Authority::Teleop);
    let second = arbiter.on_request(claim(LeaseMode::Teleop, 5), RIGHT, NOW);
    assert_eq!(second, Err(Denied::Held));
    assert_eq!(arbiter.standing().holder, LEFT);
    let change = arbiter.on_request(claim(LeaseMode::Teleop, 6), RIGHT, NOW).expect("it is higher");
    assert_eq!(change.map(|c| (c.from, c.by)), Some((Authority::Teleop, RIGHT)));
    assert!(!arbiter.on_sample(LEFT, NOW));
    let run = arbiter.on_request(AuthorityRequest::Hold, Source::RUN, NOW);
    assert_eq!(run, Err(Denied::Held), "the run takes nothing from a person");
}

#[test]
fn correcting_needs_a_policy_that_moves() {
    let mut arbiter = arbiter(Resume::Ask);
    let shared = claim(LeaseMode::Shared, 1);
    assert_eq!(arbiter.on_request(shared, LEFT, NOW), Err(Denied::NoPolicy));
    ask(&mut arbiter, AuthorityRequest::Policy, Source::RUN);
    assert_eq!(ask(&mut arbiter, shared, LEFT), Authority::Shared);
    assert_eq!(ask(&mut arbiter, claim(LeaseMode::Teleop, 1), LEFT), Authority::Teleop);
    assert_eq!(ask(&mut arbiter, shared, LEFT), Authority::Shared, "back from his own teleop");
    let release = AuthorityRequest::Release { to_policy: true };
    assert_eq!(ask(&mut arbiter, release, LEFT), Authority::Policy);
    assert_eq!(ask(&mut arbiter, AuthorityRequest::PolicyLost, Source::RUN), Authority::Hold);
}

/// A small generator, so that a storm of a hundred thousand sequences takes a second.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }

    fn who(&mut self) -> Source {
        [Source::RUN, LEFT, RIGHT, BOSS][self.roll(4) as usize]
    }

    fn request(&mut self) -> AuthorityRequest {
        let mode = if self.roll(2) == 0 { LeaseMode::Teleop } else { LeaseMode::Shared };
        let (priority, duration) =
            (self.roll(3) as u8, Duration::from_millis(50 * (1 + self.roll(20))));
        match self.roll(12) {
            0 | 1 => AuthorityRequest::Policy,
            2 => AuthorityRequest::Motion,
            3 => AuthorityRequest::Hold,
            4..=6 => AuthorityRequest::Take(Claim { mode, priority, duration }),
            7 => AuthorityRequest::Renew,
            8 => AuthorityRequest::Release { to_policy: self.roll(2) == 0 },
            9 => AuthorityRequest::PolicyLost,
            10 => AuthorityRequest::Stop,
            _ => AuthorityRequest::Reset,
        }
    }
}

/// What must be true after every event, told by a second, simpler account of what happened.
#[derive(Default)]
struct Witness {
    fresh: bool,
    stopped: bool,
    consent_missing: bool,
}

impl Witness {
    fn check(&mut self, a: &Arbiter, before: &Arbiter, change: Option<AuthorityChange>) {
        let (authority, holder) = (a.authority(), a.standing().holder);
        let lent = matches!(authority, Authority::Teleop | Authority::Shared);
        assert_eq!(lent, a.lease().is_some(), "a lease and lent authority are one thing");
        assert!(a.lease().is_none_or(|l| l.source == holder), "exactly one holder");
        assert_eq!(authority == Authority::Stop, self.stopped, "stop wins and stays");
        assert!(self.fresh || !authority.moves(), "nobody moves a stale arm");
        assert_eq!(a.standing().awaits_consent, self.consent_missing);
        let policy_moves =
            matches!(authority, Authority::Policy | Authority::Shared | Authority::Motion);
        // A correction may go on from before; everything else needs the consent.
        assert!(!policy_moves || !self.consent_missing || authority == Authority::Shared);
        let moved = authority != before.authority()
            || (lent && before.lease().map(|l| l.source) != a.lease().map(|l| l.source));
        assert_eq!(moved, change.is_some(), "every change is told, and nothing else");
        if let Some(c) = change {
            assert_eq!((c.from, c.to, c.by), (before.authority(), authority, holder));
        }
    }
}

#[test]
fn a_storm_of_requests_never_makes_authority_ambiguous() {
    for seed in 1..=120_000u64 {
        let mut dice = Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let resume = if dice.roll(2) == 0 { Resume::Ask } else { Resume::Auto };
        let ask_first = resume == Resume::Ask;
        let mut a = arbiter(resume);
        let mut witness = Witness { fresh: true, ..Witness::default() };
        let mut now = NOW;
        for _ in 0..40 {
            now = now + Duration::from_millis(dice.roll(120));
            let before = a.clone();
            let was = before.authority();
            let policy_was = matches!(was, Authority::Policy | Authority::Shared);
            let change = match dice.roll(10) {
                0 => {
                    witness.fresh = dice.roll(3) > 0;
                    witness.consent_missing |= !witness.fresh && was.moves() && ask_first;
                    a.on_state(witness.fresh, now)
                }
                1 | 2 => {
                    let change = a.on_time(now);
                    assert!(a.lease().is_none_or(|l| l.expires >= now));
                    witness.consent_missing |= change.is_some() && ask_first;
                    change
                }
                3 => {
                    let who = dice.who();
                    let holds = before.lease().is_some_and(|l| l.source == who);
                    assert_eq!(a.on_sample(who, now), holds);
                    assert!(a.lease().is_none_or(|l| l.expires <= now + Duration::from_secs(1)));
                    None
                }
                _ => {
                    let (request, who) = (dice.request(), dice.who());
                    let operator = who == BOSS || who == LEFT;
                    let answer = a.on_request(request, who, now);
                    if answer.is_err() {
                        assert_eq!(a.standing(), before.standing(), "a denial changes nothing");
                        assert_eq!(a.lease(), before.lease());
                    } else {
                        match request {
                            AuthorityRequest::Stop | AuthorityRequest::DriverStopped => {
                                (witness.stopped, witness.consent_missing) = (true, true);
                            }
                            AuthorityRequest::Reset => witness.stopped &= !operator,
                            AuthorityRequest::Hold => {
                                witness.consent_missing |= who != Source::RUN;
                            }
                            AuthorityRequest::Policy
                            | AuthorityRequest::Release { to_policy: true } => {
                                assert!(
                                    operator || (who == Source::RUN && !witness.consent_missing)
                                );
                                witness.consent_missing = false;
                            }
                            AuthorityRequest::PolicyLost => {
                                witness.consent_missing |= policy_was && ask_first;
                            }
                            AuthorityRequest::Release { to_policy: false } => {
                                witness.consent_missing |= ask_first;
                            }
                            _ => {}
                        }
                    }
                    let stopped = matches!(request, AuthorityRequest::Stop);
                    assert!(!stopped || a.authority() == Authority::Stop, "stop is never denied");
                    answer.unwrap_or_default()
                }
            };
            witness.check(&a, &before, change);
        }
    }
}
