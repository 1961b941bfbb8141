package main

import (
	"bytes"
	"slices"
	"strings"
	"text/template"
)

// bar is one in the picture.
type bar struct {
	Name  string
	Value string
	Width float64
	Y     int
	Class string
}

type barGroup struct {
	Title string
	Y     int
	Bars  []bar
}

// picture brings its own background, so it can be read on a light page and on a dark one.
var picture = template.Must(template.New("svg").Parse(`<svg xmlns="http://www.w3.org/2000/svg" ` +
	`viewBox="0 0 760 {{.Height}}" width="760" height="{{.Height}}" role="img" aria-label="{{.Label}}">
  <style>
    .page { fill: #ffffff; stroke: #d0d7de }
    text { font: 13px system-ui, sans-serif; fill: #1f2328 }
    .title { font-weight: 600 }
    .bar { fill: #afb8c1 }
    .ours { fill: #0969da }
    @media (prefers-color-scheme: dark) {
      .page { fill: #0d1117; stroke: #30363d }
      text { fill: #e6edf3 }
      .bar { fill: #545d68 }
      .ours { fill: #58a6ff }
    }
  </style>
  <rect class="page" x="0.5" y="0.5" width="759" height="{{.Edge}}" rx="6"/>
{{- range .Groups}}
  <text class="title" x="20" y="{{.Y}}">{{.Title}}</text>
{{- range .Bars}}
  <text x="250" y="{{.Y}}" dy="14" text-anchor="end">{{.Name}}</text>
  <rect class="{{.Class}}" x="260" y="{{.Y}}" width="{{printf "%.1f" .Width}}" height="18" rx="2"/>
  <text x="{{printf "%.1f" .End}}" y="{{.Y}}" dy="14">{{.Value}}</text>
{{- end}}
{{- end}}
</svg>
`))

// End is where the value stands.
func (b bar) End() float64 { return 260 + b.Width + 8 }

// draw makes the picture: requests a second of the receivers, claims a second of the stores.
func draw(receivers []receiverResult, stores []storeResult) ([]byte, error) {
	requests := make(map[string]float64)
	for _, r := range receivers {
		requests[r.name] = median(r.loopback)
	}
	claims := make(map[string]float64)
	for _, r := range stores {
		claims[r.name] = median(r.claims)
	}
	var page struct {
		Label        string
		Height, Edge int
		Groups       []barGroup
	}
	page.Label = "Requests a second of webhook receivers, and durable claims a second of stores"
	y := 0
	page.Groups = append(page.Groups, newGroup("Requests a second, every event handled", requests, &y))
	page.Groups = append(page.Groups, newGroup("Durable claims a second, 64 at once", claims, &y))
	page.Height, page.Edge = y+16, y+15
	var out bytes.Buffer
	err := picture.Execute(&out, page)
	return out.Bytes(), err
}

// newGroup draws the longest bar first, from *y on.
func newGroup(title string, values map[string]float64, y *int) barGroup {
	*y += 32
	group := barGroup{Title: title, Y: *y}
	*y += 14
	names := make([]string, 0, len(values))
	for name := range values {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int {
		if values[a] != values[b] && values[a] > values[b] {
			return -1
		}
		return 1
	})
	for _, name := range names {
		class := "bar"
		if strings.HasPrefix(name, "offloadhook") || name == journalName {
			class = "ours"
		}
		group.Bars = append(group.Bars, bar{
			Name: name, Value: thousands(values[name]), Width: 400 * values[name] / values[names[0]], Y: *y,
			Class: class,
		})
		*y += 24
	}
	return group
}
