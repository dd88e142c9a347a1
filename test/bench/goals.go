package main

import (
	"fmt"
	"strings"
)

// goal is what imps has to achieve, beside what was measured. The fields that scripts want
// are exported.
type goal struct {
	Size string `json:"size"`
	Name string `json:"name"`
	Unit string `json:"unit,omitempty"`
	// Before is banzaicloud/imps v0.3.13, measured in the same way; empty where it was not.
	Before string `json:"before,omitempty"`
	// Limit is nil where the figure stands for itself.
	Limit *float64 `json:"limit,omitempty"`
	// Seen is the median of all runs, Least and Most what it lies between.
	Seen  float64 `json:"seen"`
	Least float64 `json:"least"`
	Most  float64 `json:"most"`
	Met   bool    `json:"met"`
}

// rule makes a goal of the runs of one size.
type rule struct {
	name, unit, before string
	seen               func(sizeRun) float64
	// limit is that of one run; nil where there is none.
	limit func(sizeRun) float64
}

func atMost(limit float64) func(sizeRun) float64 { return func(sizeRun) float64 { return limit } }

// rulesOf returns the rules of a size: docs/benchmarks.md has them.
func rulesOf(size string) []rule {
	var rules []rule
	// in picks what is said of the size; empty, or nil, where nothing is.
	in := func(small, large string) string { return map[string]string{"small": small, "large": large}[size] }
	limit := func(small, large func(sizeRun) float64) func(sizeRun) float64 {
		return map[string]func(sizeRun) float64{"small": small, "large": large}[size]
	}
	if size == "accounts" {
		late := func(r sizeRun) latency { return r.phase(phaseAccounts).Latency }
		return []rule{
			{name: "ServiceAccount created → it names the Secret, p50", unit: "ms", seen: func(r sizeRun) float64 { return late(r).P50 }, limit: atMost(10)},
			{name: "ServiceAccount created → it names the Secret, p99", unit: "ms", seen: func(r sizeRun) float64 { return late(r).P99 }, limit: atMost(40)},
			{name: "ServiceAccounts written, three in each namespace", seen: func(r sizeRun) float64 {
				return float64(r.phase(phaseDelivery).Account.OtherWrites[coordinator+": patch serviceaccounts"])
			}, limit: func(r sizeRun) float64 { return float64(3 * r.Labels) }},
			{name: "resident memory, the largest process of imps", unit: "MiB", seen: largestResident},
			{name: "writes in the idle time but the Lease", seen: idleWrites, limit: atMost(0)},
		}
	}
	switch size {
	case sizeProvider:
		return providerRules()
	case sizeKubelet:
		return kubeletRules()
	}
	single := func(name, phase, p50Before, p99Before string) {
		p50 := func(r sizeRun) float64 { return r.phase(phase).Latency.P50 }
		p99 := func(r sizeRun) float64 { return r.phase(phase).Latency.P99 }
		rules = append(rules,
			rule{name: name + ", p50", unit: "ms", before: p50Before, seen: p50, limit: atMost(10)},
			rule{name: name + ", p50, of one apply's", unit: "times", seen: func(r sizeRun) float64 { return p50(r) / r.Floor.Apply.P50 }, limit: atMost(3)},
			rule{name: name + ", p99", unit: "ms", before: p99Before, seen: p99, limit: atMost(40)})
	}
	whole := func(name, phase, before string, floor func(floor) float64, limit, ofFloor func(sizeRun) float64) {
		all := func(r sizeRun) float64 { return r.phase(phase).Latency.Max }
		rules = append(rules,
			rule{name: name, unit: "ms", before: before, seen: all, limit: limit},
			rule{name: name + ", of the floor", unit: "times", seen: func(r sizeRun) float64 { return all(r) / floor(r.Floor) }, limit: ofFloor})
	}
	if size == "huge" {
		whole("resource created → every Secret there", phaseDelivery, "", func(f floor) float64 { return f.Create }, nil, nil)
	} else {
		single("Pod bound → Secret", phasePods, in("5.0 s", "12 s"), in("15 s", "39 s"))
		single("namespace labelled → Secret", phaseLabels, in("10 s", "24 s"), in("19 s", "66 s"))
	}
	whole("source rotated → every Secret new", phaseRotation, in("30 s", "75 s"),
		func(f floor) float64 { return f.Change }, limit(nil, atMost(2000)), atMost(1.5))
	whole("resource deleted → every Secret gone", phaseDeletion, in("19 s", "49 s"),
		func(f floor) float64 { return f.Delete }, limit(nil, atMost(1200)), atMost(1.5))
	return append(rules,
		rule{name: "resident memory, the largest process of imps", unit: "MiB", before: in("51 MiB", "258 MiB"), seen: largestResident, limit: limit(atMost(40), atMost(40))},
		rule{name: "Secret writes", before: in("", "4,644"), seen: func(r sizeRun) float64 { return float64(secretWrites(r)) },
			limit: func(r sizeRun) float64 { return float64(3 * (r.Pods + r.Labels)) }},
		rule{name: "all other writes, of the Secret writes", unit: "%",
			seen: func(r sizeRun) float64 { return 100 * float64(otherWrites(r)) / float64(secretWrites(r)) }, limit: atMost(5)},
		rule{name: "writes in the idle time but the Lease", seen: idleWrites, limit: atMost(0)})
}

func idleWrites(r sizeRun) float64 {
	a := r.phase(phaseIdle).Account
	return float64(a.impsWrites())
}

// goalsOf judges the runs of one size.
func goalsOf(runs []sizeRun) (goals []goal) {
	size := runs[0].Size
	for _, rule := range rulesOf(size) {
		g := goal{
			Size: size, Name: rule.name, Unit: rule.unit, Before: rule.before, Met: true,
			Seen: median(runs, rule.seen), Least: rule.seen(runs[0]), Most: rule.seen(runs[0]),
		}
		for _, r := range runs {
			g.Least, g.Most = min(g.Least, rule.seen(r)), max(g.Most, rule.seen(r))
		}
		if rule.limit != nil {
			limit := median(runs, rule.limit)
			g.Limit, g.Met = &limit, g.Seen <= limit
		}
		goals = append(goals, g)
	}
	return goals
}

// largestResident is the most that a process of imps holds with everything there, or at
// the end.
func largestResident(r sizeRun) (mib float64) {
	for name, m := range r.Memory {
		if isImps(name) {
			mib = max(mib, m.Idle, m.End)
		}
	}
	return mib
}

func isImps(process string) bool {
	return process == coordinator || process == agentName(nodes[0]) || process == agentName(nodes[1])
}

func secretWrites(r sizeRun) (n int) {
	for _, p := range r.Phases {
		n += sum(p.Account.SecretWrites)
	}
	return n
}

// otherWrites leaves the idle time out, whose length is arbitrary.
func otherWrites(r sizeRun) (n int) {
	for _, p := range r.Phases {
		if p.Name != phaseIdle {
			n += sum(p.Account.OtherWrites)
		}
	}
	return n
}

// providerRules are those of size provider.
func providerRules() []rule {
	p50 := func(a answers) float64 { return a.Times.P50 }
	of := func(name string) func(sizeRun) float64 {
		return func(r sizeRun) float64 { return p50(r.Provider.answer(name)) }
	}
	// slowest is over what imps answers at once.
	slowest := func(shape bool) func(sizeRun) float64 {
		return func(r sizeRun) float64 {
			return r.Provider.most(func(name string) bool {
				return isImpsAnswer(name) && name != answerWaits && strings.HasSuffix(name, setShape) == shape
			}, p50)
		}
	}
	rules := []rule{
		{name: "imps, the slowest question with up to 1,000 records or globs, p50", unit: "ms", seen: slowest(false), limit: atMost(3)},
		{name: "imps, the slowest question with " + setShape + ", p50", unit: "ms", seen: slowest(true), limit: atMost(3)},
	}
	for _, latency := range latencies {
		beside := besideName(latency)
		rules = append(rules, rule{name: "a hit of imps, of " + beside + ", p50", unit: "%",
			seen: func(r sizeRun) float64 { return 100 * of(answerHit)(r) / of(beside)(r) }, limit: atMost(20)})
	}
	return append(rules,
		rule{name: "peak memory of imps, the most of all questions", unit: "MiB",
			seen: func(r sizeRun) float64 {
				return r.Provider.most(isImpsAnswer, func(a answers) float64 { return a.PeakMiB })
			},
			limit: atMost(10)},
		rule{name: "size of " + impsProvider, unit: "MB", seen: func(r sizeRun) float64 { return r.Provider.BinaryMB[impsProvider] }, limit: atMost(3)},
		rule{name: "size of " + ecrProvider, unit: "MB", seen: func(r sizeRun) float64 { return r.Provider.BinaryMB[ecrProvider] }},
		rule{name: fmt.Sprintf("calls to AWS, %d repositories at once", pulls), seen: func(r sizeRun) float64 { return float64(r.Provider.burst(answerHit).Calls) }, limit: atMost(0)})
}

// isImpsAnswer tells the answers of imps-credprovider by their names.
func isImpsAnswer(name string) bool { return strings.HasPrefix(name, "imps: ") }
