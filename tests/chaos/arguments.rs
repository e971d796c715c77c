//! The options of a long run: the arguments in `NOMAD_DRIVER_SHIM_CHAOS`, which `make chaos ARGS="..."` sets.

use crate::plan::Mode;

/// The parsed arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Arguments {
    pub seed: u64,
    /// The number of faults in all, spread over the modes. `None` means the usual number.
    pub faults: Option<usize>,
    pub modes: Vec<Mode>,
    /// A step of the driver that is left out as a planted defect. The test must find this defect.
    pub plant: Option<String>,
    /// The number of kills in the middle of the runtime's calls, in a run that has no other faults.
    pub aimed: Option<usize>,
    /// The number of short tasks to run, with samples of what resources the driver uses.
    pub soak: Option<usize>,
    /// The numbers of the seed's steps that are played. The other steps are left out.
    pub keep: Option<Vec<usize>>,
    /// How many times parts of a failed history may be played again to find a shorter one.
    pub replays: usize,
    /// Known defects: a violation that contains one of these texts is not counted. `_` stands for a space.
    pub ignored: Vec<String>,
    /// May the test set the clock of the host?
    pub clock: bool,
    /// Which agent the run uses.
    pub agent: AgentKind,
}

/// The agent that a run uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AgentKind {
    StandIn,
    /// A real agent: the program that `NOMAD_BIN` names, or `nomad` in PATH.
    Nomad,
}

impl Arguments {
    /// Reads `--seed N --faults N --mode NAME --plant NAME --aimed N --soak N --keep N,N --replays N --ignore TEXT
    /// --agent NAME --clock`.
    ///
    /// # Errors
    /// When an argument is not understood.
    pub(crate) fn parse(text: &str, default_seed: u64) -> Result<Self, String> {
        let mut this = Self {
            seed: default_seed,
            faults: None,
            modes: Vec::new(),
            plant: None,
            aimed: None,
            soak: None,
            keep: None,
            replays: 16,
            ignored: Vec::new(),
            clock: false,
            agent: AgentKind::StandIn,
        };
        let mut words = text.split_whitespace();
        while let Some(word) = words.next() {
            if word == "--clock" {
                this.clock = true;
                continue;
            }
            let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
            let number = || value.parse::<usize>().map_err(|_| format!("{word} needs a number, not {value:?}"));
            match word {
                "--seed" => this.seed = value.parse().map_err(|_| format!("{word} needs a number, not {value:?}"))?,
                "--faults" => this.faults = Some(number()?),
                "--mode" => {
                    let mode = Mode::named(value).ok_or_else(|| {
                        let names: Vec<&str> = Mode::ALL.iter().map(|mode| mode.name()).collect();
                        format!("--mode {value:?} is none of {}", names.join(", "))
                    })?;
                    this.modes.push(mode);
                }
                "--plant" => this.plant = Some(value.to_owned()),
                "--aimed" => this.aimed = Some(number()?),
                "--soak" => this.soak = Some(number()?),
                "--ignore" => this.ignored.push(value.replace('_', " ")),
                "--agent" => {
                    this.agent = match value {
                        "stand-in" => AgentKind::StandIn,
                        "nomad" => AgentKind::Nomad,
                        _ => return Err(format!("--agent {value:?} is none of stand-in, nomad")),
                    };
                }
                "--replays" => this.replays = number()?,
                "--keep" => {
                    let numbers = value.split(',').map(str::parse).collect::<Result<_, _>>();
                    this.keep = Some(numbers.map_err(|_| format!("--keep needs numbers of steps, not {value:?}"))?);
                }
                _ => return Err(format!("{word} is not known")),
            }
        }
        Ok(this)
    }
}

#[test]
fn arguments_are_read() {
    let read = |text| Arguments::parse(text, 1);
    let all = read("--seed 5 --faults 20 --mode base --mode bridge --plant intent --keep 1,2 --clock").unwrap();
    assert_eq!((all.seed, all.faults, &all.modes[..]), (5, Some(20), &[Mode::Base, Mode::Bridge][..]));
    assert_eq!((all.plant.as_deref(), all.keep, all.clock), (Some("intent"), Some(vec![1, 2]), true));
    assert_eq!((read("").unwrap().seed, read("").unwrap().agent), (1, AgentKind::StandIn));
    assert_eq!(read("--agent nomad").unwrap().agent, AgentKind::Nomad);
    assert!(read("--agent x").unwrap_err().contains("stand-in"));
    assert!(read("--mode x").unwrap_err().contains("own-logs"));
    assert!(read("--seed").unwrap_err().contains("needs a value"));
    assert!(read("--nonsense 1").unwrap_err().contains("not known"));
}
