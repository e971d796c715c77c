//! `bench`: compares what a task costs with this driver and with other ways to run it.

use std::path::PathBuf;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use super::{
    CliError, CommonArgs, ContainerdSession,
    gc::StoreLock,
    is_interactive, parse_image, print_data, print_message,
    runs::{plugin_config, remove_unless_mounted},
};
use crate::{
    bench::{self, Plan, Results, SubjectKind, SubjectPlan, Workspace},
    ids::random_hex,
};

/// The progress bar of the one benchmark that a process runs. It is a static because `Workspace::on_progress` is a
/// plain function.
static BAR: std::sync::OnceLock<ProgressBar> = std::sync::OnceLock::new();

#[derive(Args, Debug)]
pub(crate) struct Bench {
    /// The image of all tasks, as `run` takes it; its program is not run
    #[arg(required_unless_present = "compare")]
    image: Option<String>,
    /// The plan of what is measured, as TOML
    #[arg(long, value_name = "FILE")]
    plan: Option<PathBuf>,
    /// Measure only roughly, in less than a minute
    #[arg(long)]
    quick: bool,
    /// The number of tasks of each path in each mode
    #[arg(long, value_name = "N")]
    count: Option<usize>,
    /// Measure only these paths of the plan, by name
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    paths: Vec<String>,
    /// Measure an additional Nomad driver plugin
    #[arg(long, value_name = "PROGRAM")]
    plugin: Vec<PathBuf>,
    /// The configuration of each --plugin, as JSON, in the same order
    #[arg(long, value_name = "JSON", requires = "plugin")]
    plugin_config: Vec<String>,
    /// Options of the `config` block of the tasks of each --plugin, as JSON, in the same order
    #[arg(long, value_name = "JSON", requires = "plugin")]
    task_config: Vec<String>,
    /// Print all figures, not only the overview
    #[arg(long)]
    all: bool,
    /// Write all figures and samples to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page with pictures to this file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write the pictures to this directory, one SVG file each
    #[arg(long, value_name = "DIR")]
    pictures: Option<PathBuf>,
    /// Compare two earlier results instead of measuring
    #[arg(long, num_args = 2, value_names = ["BEFORE", "AFTER"], conflicts_with = "image")]
    compare: Option<Vec<PathBuf>>,
}

impl Bench {
    /// Measures or compares. Returns 1 if this driver failed, or if another subject failed after it was measured in
    /// part.
    ///
    /// # Errors
    /// Fails when this driver can't be measured, or the plan is not valid.
    pub(crate) async fn execute(self, common: &CommonArgs) -> Result<u8, CliError> {
        if let Some(files) = &self.compare {
            let [before, after] = [&files[0], &files[1]].map(|path| -> Result<Results, CliError> {
                let text = std::fs::read_to_string(path)?;
                serde_json::from_str(&text).map_err(|error| CliError::Usage(format!("{}: {error}", path.display())))
            });
            print_data(&bench::compare(&before?, &after?))?;
            return Ok(0);
        }
        let plan = self.build_plan()?;
        let _lock = StoreLock::shared(common)?;
        let store = ContainerdSession::open(common).await?;
        // The name is short because sockets are below the directory, and their paths are limited.
        let id = format!("bench-{}", random_hex(4));
        let workspace = Workspace {
            program: std::env::current_exe()?,
            run: common.run_dir.join(&id),
            state: common.state_dir.join(&id),
            driver_state: common.places(&id).state().to_owned(),
            driver_config: plugin_config(common, &store.address, &id),
            address: store.address.clone(),
            namespace: common.namespace.clone(),
            on_progress: |count| {
                if let Some(bar) = BAR.get() {
                    bar.inc(count);
                }
            },
        };
        if is_interactive() {
            let style = ProgressStyle::with_template("{bar:40} {pos}/{len} tasks, {eta} left");
            let bar = ProgressBar::new(plan.tasks());
            let _ = BAR.set(bar.with_style(style.map_err(std::io::Error::other)?));
        }
        let outcome = Box::pin(bench::run(&plan, &workspace)).await;
        if let Some(bar) = BAR.get() {
            bar.finish_and_clear();
        }
        store.close().await;
        for directory in [&workspace.run, &workspace.state] {
            if !remove_unless_mounted(directory) {
                print_message(&format!("nomad-driver-shim: something is still mounted in {}", directory.display()));
            }
        }
        let results = outcome?;
        let json = serde_json::to_string(&results).map_err(std::io::Error::other)?;
        if let Some(path) = &self.json {
            std::fs::write(path, json)?;
        }
        if let Some(path) = &self.html {
            std::fs::write(path, bench::html(&results))?;
        }
        if let Some(directory) = &self.pictures {
            std::fs::create_dir_all(directory)?;
            for picture in bench::pictures(&results) {
                std::fs::write(directory.join(picture.file_name()), picture.svg)?;
            }
        }
        print_data(&bench::overview(&results))?;
        print_data(&if self.all { bench::table(&results) } else { self.hint_for_all_figures() })?;
        Ok(u8::from(results.is_broken()))
    }

    /// Returns a sentence for the user about where to find the figures that the overview leaves out.
    fn hint_for_all_figures(&self) -> String {
        match &self.json {
            Some(path) => {
                format!("\nAll figures and samples are in {}. `bench --all` prints the figures.\n", path.display())
            }
            None => "\n`bench --all` prints all figures, and --json FILE writes them with their samples.\n".to_owned(),
        }
    }

    fn build_plan(&self) -> Result<Plan, CliError> {
        let usage = CliError::Usage;
        let mut plan = match &self.plan {
            None => Plan::default(),
            Some(path) => Plan::parse(&std::fs::read_to_string(path)?)
                .map_err(|problem| usage(format!("{}: {problem}", path.display())))?,
        };
        if let Some(image) = &self.image {
            plan.image = parse_image(image)?.to_string();
        }
        if let Some(count) = self.count {
            plan.count = count;
        }
        if self.quick {
            plan = plan.quick();
        }
        for (n, program) in self.plugin.iter().enumerate() {
            let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let object = |option: &str, texts: &[String]| {
                let text = texts.get(n).map_or("{}", String::as_str);
                serde_json::from_str(text).map_err(|error| usage(format!("--{option} {text:?}: {error}")))
            };
            plan.paths.push(SubjectPlan {
                program: Some(program.clone()),
                config: object("plugin-config", &self.plugin_config)?,
                task: object("task-config", &self.task_config)?,
                ..SubjectPlan::new(&name, SubjectKind::Plugin)
            });
        }
        if !self.paths.is_empty() {
            let known: Vec<&str> = plan.paths.iter().map(|path| path.name.as_str()).collect();
            if let Some(unknown) = self.paths.iter().find(|name| !known.contains(&name.as_str())) {
                return Err(usage(format!("--paths {unknown:?} is not in the plan, which has {}", known.join(", "))));
            }
            plan.paths.retain(|path| self.paths.contains(&path.name));
        }
        plan.check().map_err(usage)?;
        Ok(plan)
    }
}
