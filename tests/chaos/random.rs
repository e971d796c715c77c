//! Random numbers from a seed, the same on every machine and with every version of the compiler.

/// SplitMix64 (Steele, Lea and Flood: Fast splittable pseudorandom number generators, 2014).
pub(crate) struct Random(u64);

impl Random {
    /// The sequence of this seed.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from `low` to `high`, both inclusive.
    pub(crate) fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.next() % (high - low + 1)
    }

    /// True in `percent` of 100 cases.
    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.next() % 100 < percent
    }

    /// Picks one of several values.
    pub(crate) fn one_of<T: Copy>(&mut self, things: &[T]) -> T {
        let last = things.len() as u64 - 1;
        things[usize::try_from(self.between(0, last)).unwrap()]
    }

    /// Picks one of several values, each with a probability according to its weight.
    pub(crate) fn weighted<T: Copy>(&mut self, things: &[(u64, T)]) -> T {
        let total: u64 = things.iter().map(|(weight, _)| weight).sum();
        let mut rest = self.between(1, total);
        for (weight, thing) in things {
            if rest <= *weight {
                return *thing;
            }
            rest -= weight;
        }
        unreachable!("the weights sum up to the total")
    }
}

#[test]
fn a_seed_gives_the_same_numbers_always() {
    let mut random = Random::new(1);
    assert_eq!([random.next(), random.next()], [10_451_216_379_200_822_465, 13_757_245_211_066_428_519]);
    let mut random = Random::new(2);
    let drawn: Vec<u64> = (0..1000).map(|_| random.between(3, 5)).collect();
    assert!([3, 4, 5].iter().all(|wanted| drawn.contains(wanted)) && drawn.iter().all(|n| (3..=5).contains(n)));
    assert!((0..1000).all(|_| random.weighted(&[(1, 'a'), (0, 'b'), (2, 'c')]) != 'b'));
}
