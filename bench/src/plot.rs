//! Lines over axes, as SVG.

use std::path::Path;

use anyhow::Context;
use plotters::prelude::*;

const SIZE: (u32, u32) = (760, 420);
const COLOURS: [RGBColor; 6] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(44, 160, 44),
    RGBColor(148, 103, 189),
    RGBColor(255, 127, 14),
    RGBColor(90, 90, 90),
];

pub struct Panel {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub lines: Vec<Line>,
}

#[derive(Clone, Copy)]
pub struct Axis {
    pub name: &'static str,
    pub is_log: bool,
}

pub struct Line {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// One panel below the other.
///
/// # Errors
/// When the file cannot be written.
pub fn draw(path: &Path, panels: &[Panel]) -> anyhow::Result<()> {
    let (width, height) = SIZE;
    let rows = u32::try_from(panels.len()).context("too many panels")?;
    let area = SVGBackend::new(path, (width, height * rows.max(1))).into_drawing_area();
    area.fill(&WHITE)?;
    for (part, panel) in area.split_evenly((panels.len().max(1), 1)).iter().zip(panels) {
        draw_panel(part, panel).with_context(|| format!("drawing {:?}", panel.title))?;
    }
    area.present().with_context(|| format!("writing {}", path.display()))
}

fn draw_panel(area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>, panel: &Panel) -> anyhow::Result<()> {
    let (x, y) = (panel.range(panel.x, |point| point.0), panel.range(panel.y, |point| point.1));
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, ("sans-serif", 16))
        .margin(14)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(x, y)?;
    // A logarithm is an axis of exponents, labelled by what they stand for.
    let label = |axis: Axis| move |value: &f64| figure(if axis.is_log { value.exp2() } else { *value });
    chart
        .configure_mesh()
        .x_desc(panel.x.name)
        .y_desc(panel.y.name)
        .x_labels(10)
        .y_labels(8)
        .x_label_formatter(&label(panel.x))
        .y_label_formatter(&label(panel.y))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for (line, colour) in panel.lines.iter().zip(COLOURS.iter().cycle()) {
        let points: Vec<(f64, f64)> =
            line.points.iter().map(|point| (panel.x.place(point.0), panel.y.place(point.1))).collect();
        let style = colour.stroke_width(2);
        // Points of a few measurements are seen; those of every second would be a smear.
        let dot = if points.len() > 50 { 0 } else { 3 };
        chart
            .draw_series(LineSeries::new(points, style).point_size(dot))?
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}

impl Axis {
    fn place(self, value: f64) -> f64 {
        // Nothing is shown at the bottom of a logarithm.
        if self.is_log { value.max(0.01).log2() } else { value }
    }
}

impl Panel {
    fn range(&self, axis: Axis, of: impl Fn(&(f64, f64)) -> f64) -> std::ops::Range<f64> {
        let values = self.lines.iter().flat_map(|line| &line.points).map(|point| axis.place(of(point)));
        let (least, most) =
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), value| (least.min(value), most.max(value)));
        if !least.is_finite() {
            return 0.0..1.0;
        }
        // Amounts are seen from 0 on, so that half as much looks like it.
        let least = if axis.is_log { least.floor() } else { least.min(0.0) };
        least..(most + 0.05 * (most - least)).max(least + 1.0)
    }
}

/// At most four digits, as people write them.
fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 10_000.0 => format!("{:.0}k", value / 1000.0),
        size if size >= 10.0 => format!("{value:.0}"),
        size if size >= 1.0 => format!("{value:.1}").trim_end_matches(".0").to_owned(),
        0.0 => "0".to_owned(),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short() {
        for (value, text) in [(0.0, "0"), (0.25, "0.25"), (1.0, "1"), (1.5, "1.5"), (512.4, "512"), (12_000.0, "12k")] {
            assert_eq!(figure(value), text);
        }
    }

    #[test]
    fn a_panel_without_points_is_drawn_empty() {
        let axis = Axis { name: "s", is_log: false };
        let panel = Panel { title: "none".to_owned(), x: axis, y: axis, lines: Vec::new() };
        assert_eq!(panel.range(axis, |point| point.0), 0.0..1.0);
    }
}
