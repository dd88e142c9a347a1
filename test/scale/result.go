package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/watch"

	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

// result is what a simulation has found.
type result struct {
	Config     config   `json:"config"`
	Kubernetes string   `json:"kubernetes"`
	Processors int      `json:"processors"`
	Phases     []*phase `json:"phases"`
	Sizes      []size   `json:"sizes"`
	// Faults are what was not as it must be.
	Faults []string `json:"faults"`
}

// phase is what was found in one part of the run.
type phase struct {
	Name    string    `json:"name"`
	Seconds float64   `json:"seconds"`
	Figures []figure  `json:"figures"`
	Counts  []counted `json:"counts"`
	// Peak is the most requests that imps made within one second.
	Peak int `json:"peakRequestsPerSecond"`
	// Changes are events of target Secrets at an independent watcher.
	Changes map[watch.EventType]int `json:"changes"`
	Usage   usages                  `json:"usage"`
}

// figure is something that was measured.
type figure struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
}

func (f figure) String() string {
	return strings.TrimSpace(fmt.Sprintf("%s %.4g %s", f.Name, f.Value, f.Unit))
}

func (p *phase) figure(name string, value float64, unit string) {
	p.Figures = append(p.Figures, figure{name, value, unit})
}

// Who asks.
type user string

const (
	agents          user = "agents"
	coordinatorUser user = "coordinator"
	other           user = "other" // also the simulation itself
)

func userOf(e cluster.Event) user {
	switch e.User {
	case "system:serviceaccount:" + imps.SystemNamespace + ":imps-node":
		return agents
	case "system:serviceaccount:" + imps.SystemNamespace + ":imps-coordinator":
		return coordinatorUser
	default:
		return other
	}
}

// Two kinds of watch: the list is streamed first, or it goes on where another has ended.
const (
	listAndWatch = "list and watch"
	watchOn      = "watch on"
)

// request is a kind of request.
type request struct {
	User user `json:"user"`
	// Verb is Kubernetes' own; but a watch is listAndWatch or watchOn.
	Verb string `json:"verb"`
	// What is the resource; other is not told apart.
	What string `json:"what"`
}

// counted are requests of a kind.
type counted struct {
	request
	Requests int `json:"requests"`
	// Created are those after which there was something that was not there before, and
	// Writes, with these, all writes that succeeded: also those that found it done.
	Created int `json:"created"`
	Writes  int `json:"writes"`
	// Failed are those that failed, by their status code.
	Failed failures `json:"failed"`
}

// failures are numbers of requests by status code.
type failures map[int]int

// String is empty where there is none.
func (f failures) String() string {
	parts := make([]string, 0, len(f))
	for _, code := range slices.Sorted(maps.Keys(f)) {
		parts = append(parts, fmt.Sprintf("%d of %d", f[code], code))
	}
	return strings.Join(parts, ", ")
}

var writing = []string{"create", "update", "patch", "delete", "deletecollection"}

func requestOf(e cluster.Event) request {
	r := request{User: userOf(e), Verb: e.Verb, What: e.Resource}
	if r.User == other {
		return request{User: other, Verb: "any", What: "anything"}
	}
	if e.Subresource != "" {
		r.What += "/" + e.Subresource
	}
	switch e.Resource {
	case "secrets":
		switch e.Namespace {
		case imps.RenderedNamespace:
			r.What = "rendered Secrets"
		case imps.SystemNamespace:
			r.What = "state Secrets"
		case imps.SourceNamespace:
			r.What = "source Secrets"
		default:
			r.What = "target Secrets"
		}
	case "configmaps":
		r.What = "node reports"
	}
	if r.Verb == "watch" {
		r.Verb = watchOn
		if strings.Contains(e.URI, "sendInitialEvents=true") {
			r.Verb = listAndWatch
		}
	}
	return r
}

// isEndOfWatch: the watch has begun before, in an event of its own.
func isEndOfWatch(e cluster.Event) bool {
	return e.Verb == "watch" && e.Stage == cluster.StageComplete && e.Code < http.StatusBadRequest
}

// count counts requests once each: a watch when it begins, anything else when it is answered.
func (p *phase) count(events []cluster.Event) {
	counts := map[request]counted{}
	seconds := map[int64]int{}
	for _, e := range events {
		if isEndOfWatch(e) {
			continue
		}
		// That something is not there is an answer, too.
		failed := e.Code >= http.StatusBadRequest && (e.Verb != "get" || e.Code != http.StatusNotFound)
		kind := requestOf(e)
		c := counts[kind]
		c.request = kind
		c.Requests++
		switch {
		case failed:
			if c.Failed == nil {
				c.Failed = failures{}
			}
			c.Failed[e.Code]++
		case slices.Contains(writing, e.Verb) && !strings.HasSuffix(e.Resource, "reviews"): // which are questions
			c.Writes++
			if e.Code == http.StatusCreated {
				c.Created++
			}
		}
		counts[kind] = c
		if kind.User != other {
			second := e.Received.Unix()
			seconds[second]++
			p.Peak = max(p.Peak, seconds[second])
		}
	}
	p.Counts = slices.SortedFunc(maps.Values(counts), func(a, b counted) int {
		return cmp.Or(cmp.Compare(a.User, b.User), cmp.Compare(a.What, b.What), cmp.Compare(a.Verb, b.Verb))
	})
}

// sum adds up what is counted of a user; what and verb may be empty, for any.
func (p *phase) sum(by user, verb, what string) counted {
	sum := counted{Failed: failures{}}
	for _, c := range p.Counts {
		if c.User == by && (verb == "" || verb == c.Verb) && (what == "" || what == c.What) {
			sum.Requests += c.Requests
			sum.Created += c.Created
			sum.Writes += c.Writes
			for code, n := range c.Failed {
				sum.Failed[code] += n
			}
		}
	}
	return sum
}

func (p *phase) String() string {
	parts := []string{fmt.Sprintf("%.1f s", p.Seconds)}
	for _, u := range []user{agents, coordinatorUser} {
		sum := p.sum(u, "", "")
		parts = append(parts, fmt.Sprintf("%s: %d requests, %d writes, failed: [%s]", u, sum.Requests, sum.Writes, sum.Failed))
	}
	for _, f := range p.Figures {
		parts = append(parts, f.String())
	}
	return strings.Join(parts, "; ")
}

const mebi = 1 << 20

// markdown writes the result as tables.
func (r *result) markdown(w io.Writer) error {
	c := r.Config
	var out strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&out, format+"\n", args...) }
	line("%d agents, %d further reports, %d namespaces, %d Pods on each node (%d of them waiting), %d resources; Kubernetes %s, %d processors.",
		c.Agents, c.Reports, c.Namespaces, c.Pods, c.Waiting, c.Resources, r.Kubernetes, r.Processors)
	line("\n| phase | s | measured | Secrets added, modified, deleted | requests of agents, coordinator | peak a second | writes of agents, coordinator, others | failed, by status |")
	line("|---|---|---|---|---|---|---|---|")
	for _, p := range r.Phases {
		measured := make([]string, 0, len(p.Figures))
		for _, f := range p.Figures {
			measured = append(measured, f.String())
		}
		a, k, o := p.sum(agents, "", ""), p.sum(coordinatorUser, "", ""), p.sum(other, "", "")
		failed := maps.Clone(a.Failed)
		for code, n := range k.Failed {
			failed[code] += n
		}
		line("| %s | %.0f | %s | %d, %d, %d | %d, %d | %d | %d, %d, %d | %s |", p.Name, p.Seconds, strings.Join(measured, "; "),
			p.Changes[watch.Added], p.Changes[watch.Modified], p.Changes[watch.Deleted],
			a.Requests, k.Requests, p.Peak, a.Writes, k.Writes, o.Writes, failed)
	}
	line("\n| phase | API server MiB, peak, CPU s | coordinator MiB, peak, CPU s | received, sent MiB | agents' process MiB, KiB each, CPU s | received, sent MiB |")
	line("|---|---|---|---|---|---|")
	for _, p := range r.Phases {
		s, k, a := p.Usage.APIServer, p.Usage.Coordinator, p.Usage.Agents
		line("| %s | %d, %d, %.1f | %d, %d, %.1f | %.1f, %.1f | %d, %d, %.1f | %.1f, %.1f |", p.Name,
			s.ResidentBytes/mebi, s.PeakBytes/mebi, s.CPUSeconds,
			k.ResidentBytes/mebi, k.PeakBytes/mebi, k.CPUSeconds, float64(k.ReceivedBytes)/mebi, float64(k.SentBytes)/mebi,
			a.ResidentBytes/mebi, a.ResidentBytes>>10/int64(c.Agents), a.CPUSeconds, float64(a.ReceivedBytes)/mebi, float64(a.SentBytes)/mebi)
	}
	line("\n| object | how many | mean bytes |")
	line("|---|---|---|")
	for _, size := range r.Sizes {
		line("| %s | %d | %d |", size.What, size.Objects, size.MeanBytes)
	}
	line("\n| phase | who | request | requests | succeeded writes | of these created | failed, by status |")
	line("|---|---|---|---|---|---|---|")
	for _, p := range r.Phases {
		for _, k := range p.Counts {
			line("| %s | %s | %s %s | %d | %d | %d | %s |", p.Name, k.User, k.Verb, k.What, k.Requests, k.Writes, k.Created, k.Failed)
		}
	}
	_, err := io.WriteString(w, out.String())
	return err
}
