package main

import (
	"math"
	"slices"
	"time"
)

// result is everything that was measured.
type result struct {
	Machine machine   `json:"machine"`
	Rate    float64   `json:"triggersPerSecond"`
	Idle    float64   `json:"idleSeconds"`
	Goals   []goal    `json:"goals"`
	Runs    []sizeRun `json:"runs"`
}

// sizeRun is one run of one size, on a control plane of its own but for size provider.
type sizeRun struct {
	Size   string `json:"size"`
	Pods   int    `json:"podNamespaces"`
	Labels int    `json:"labelNamespaces"`
	// Load is the machine's own before the run.
	Load float64 `json:"loadBefore"`
	// Cuts is how often the API server has ended the watcher's watch; some times are then
	// longer than they were.
	Cuts   int     `json:"watcherCuts"`
	Floor  floor   `json:"floor,omitzero"`
	Phases []phase `json:"phases"`
	// Memory is what each process used after the idle time, when it had everything, and at
	// the end.
	Memory map[string]memory `json:"memory"`
	// Provider is what size provider has measured, and nothing else.
	Provider *providerRun `json:"provider,omitempty"`
	// Kubelet is what size kubelet has measured, and nothing else.
	Kubelet *kubeletRun `json:"kubelet,omitempty"`
}

// phase is one kind of change, from its trigger to what imps has made of it.
type phase struct {
	Name string `json:"name"`
	// Latency is from the API server's answer to the trigger to the event at the watcher,
	// for each Secret. Where one trigger concerns all, Max is the time until all was done.
	Latency latency `json:"latencyMilliseconds"`
	// Extra are events beyond one for each Secret.
	Extra   int     `json:"extraEvents"`
	Account account `json:"account"`
	// CPU are the seconds that each process has used, with the time to settle.
	CPU map[string]float64 `json:"cpuSeconds"`
}

// memory is in MiB.
type memory struct {
	Idle float64 `json:"idleMiB"`
	End  float64 `json:"endMiB"`
	Peak float64 `json:"peakMiB"`
}

// phase returns the phase of that name, an empty one where there was none.
func (r sizeRun) phase(name string) phase {
	for _, p := range r.Phases {
		if p.Name == name {
			return p
		}
	}
	return phase{}
}

// latency is what became of the single times of a phase, in milliseconds.
type latency struct {
	Samples int     `json:"samples"`
	P50     float64 `json:"p50"`
	P90     float64 `json:"p90"`
	P99     float64 `json:"p99"`
	Max     float64 `json:"max"`
}

func latencyOf(times []time.Duration) latency {
	ms := make([]float64, 0, len(times))
	for _, t := range times {
		ms = append(ms, t.Seconds()*1000)
	}
	slices.Sort(ms)
	return latency{Samples: len(ms), P50: percentile(ms, 50), P90: percentile(ms, 90), P99: percentile(ms, 99), Max: percentile(ms, 100)}
}

// percentile returns the smallest of the sorted values that no less than p per cent of
// them do not exceed (nearest rank): always one that was measured. It is zero where there
// are none.
func percentile(sorted []float64, p float64) float64 {
	if len(sorted) == 0 {
		return 0
	}
	rank := int(math.Ceil(p / 100 * float64(len(sorted))))
	return sorted[max(rank, 1)-1]
}

// median is over the runs of one size: the mean of the middle two where their number is
// even.
func median(runs []sizeRun, of func(sizeRun) float64) float64 {
	values := make([]float64, 0, len(runs))
	for _, r := range runs {
		values = append(values, of(r))
	}
	slices.Sort(values)
	n := len(values)
	return (values[(n-1)/2] + values[n/2]) / 2
}
