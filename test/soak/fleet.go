package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/imps-node/imps/test/imps"
)

var nodes = []string{"node-a", "node-b", "node-c"}

// longLived is the agent that is never restarted, so that a leak has the time to show.
const longLived = "node-c"

// proxied are the processes that reach the API server through the proxy.
var proxied = []string{"coordinator-2", "agent-node-a", "agent-node-b"}

// fleet is all processes of imps.
type fleet struct {
	members []*member
	// samples are what each role used, at the quiet points.
	samples map[string][]sample
}

// member is one process, and the next where it is started again.
type member struct {
	name    string
	node    string // of an agent
	start   func() (*imps.Process, error)
	process *imps.Process
	// down: it was ended on purpose.
	down bool
}

type sample struct{ goroutines, descriptors, residentMiB int }

// recruit starts two coordinators and an agent on each node.
func (s *soak) recruit(ctx context.Context, binary string) error {
	s.fleet.samples = map[string][]sample{}
	add := func(name, node string, spec imps.Spec) error {
		spec.Name = name
		spec.Args = append(slices.Clone(spec.Args), "--demand-linger="+linger.String(), "--log-level="+s.logLevel)
		if slices.Contains(proxied, name) {
			spec.Config = s.proxy.Config(spec.Config)
		}
		m := &member{name: name, node: node, start: func() (*imps.Process, error) { return imps.Start(ctx, s.control, binary, s.dir, spec) }}
		s.fleet.members = append(s.fleet.members, m)
		return m.run(ctx)
	}
	for _, name := range []string{"coordinator-1", "coordinator-2"} {
		spec, err := imps.Coordinator(ctx, s.control)
		if err != nil {
			return err
		}
		if err := add(name, "", spec); err != nil {
			return err
		}
	}
	for _, node := range nodes {
		spec, err := imps.Agent(ctx, s.control, node)
		if err != nil {
			return err
		}
		if err := add("agent-"+node, node, spec); err != nil {
			return err
		}
	}
	return nil
}

// run starts it, and waits until it serves, whatever else: before, SIGTERM is no orderly end.
func (m *member) run(ctx context.Context) (err error) {
	if m.process, err = m.start(); err != nil {
		return err
	}
	m.down = false
	return until(ctx, "start "+m.name, func(ctx context.Context) error {
		_, err := m.process.Metrics(ctx)
		return err
	})
}

func (m *member) end(crash bool) error {
	m.down = true
	if crash {
		m.process.Kill()
		return nil
	}
	return m.process.Terminate()
}

func (f *fleet) agent(node string) *member {
	i := slices.IndexFunc(f.members, func(m *member) bool { return m.node == node })
	return f.members[i]
}

func (f *fleet) coordinators() []*member { return f.members[:2] }

// leader returns the coordinator that leads and the other; where none says so, the first
// counts.
func (f *fleet) leader(ctx context.Context) (leader, standby *member) {
	leader, standby = f.members[0], f.members[1]
	if text, err := standby.process.Metrics(ctx); err == nil && metric(text, "imps_leader") == 1 {
		return standby, leader
	}
	return leader, standby
}

// metric reads one metric without labels.
func metric(text, name string) float64 {
	match := regexp.MustCompile(`(?m)^` + name + ` (\S+)$`).FindStringSubmatch(text)
	if match == nil {
		return 0
	}
	value, err := strconv.ParseFloat(match[1], 64)
	if err != nil {
		return 0
	}
	return value
}

// alive returns an error where a process has ended on its own.
func (f *fleet) alive() error {
	for _, m := range f.members {
		select {
		case <-m.process.Ended():
			if !m.down {
				return fmt.Errorf("%s ended on its own; its log ends with\n%s", m.name, tail(m.process.Log()))
			}
		default:
		}
	}
	return nil
}

// ready waits until every process says that it is.
func (f *fleet) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for _, m := range f.members {
		if err := m.process.AwaitReady(ctx); err != nil {
			return err
		}
	}
	return nil
}

// stop ends every process in order.
func (f *fleet) stop() error {
	var errs []error
	for _, m := range f.members {
		errs = append(errs, m.end(false))
	}
	return errors.Join(errs...)
}

// kill ends what still runs, also what is stopped.
func (f *fleet) kill() {
	for _, m := range f.members {
		if m.process != nil {
			m.process.Kill()
		}
	}
}

// leading returns an error unless exactly one coordinator leads.
func (f *fleet) leading(ctx context.Context) error {
	var leaders []string
	for _, m := range f.coordinators() {
		text, err := m.process.Metrics(ctx)
		if err != nil {
			return fmt.Errorf("metrics of %s: %w", m.name, err)
		}
		if metric(text, "imps_leader") == 1 {
			leaders = append(leaders, m.name)
		}
	}
	if len(leaders) != 1 {
		return fmt.Errorf("%d coordinators lead: %v", len(leaders), leaders)
	}
	return nil
}

// measure takes a sample of each process, and looks for the canary in its metrics.
func (f *fleet) measure(ctx context.Context) error {
	for _, m := range f.members {
		text, err := m.process.Metrics(ctx)
		if err != nil {
			return fmt.Errorf("metrics of %s: %w", m.name, err)
		}
		if err := findCanary("the metrics of "+m.name, text); err != nil {
			return err
		}
		usage, err := m.process.Usage()
		if err != nil {
			return fmt.Errorf("usage of %s: %w", m.name, err)
		}
		role := m.name
		if m.node == "" {
			role = map[bool]string{true: "leader", false: "standby"}[metric(text, "imps_leader") == 1]
		}
		f.samples[role] = append(f.samples[role], sample{
			int(metric(text, "go_goroutines")), usage.Descriptors, int(usage.ResidentBytes >> 20),
		})
	}
	return nil
}

// quarters returns the medians of the first and the last quarter.
func quarters(samples []sample, of func(sample) int) (first, last int) {
	n := max(1, len(samples)/4)
	median := func(part []sample) int {
		values := make([]int, 0, len(part))
		for _, s := range part {
			values = append(values, of(s))
		}
		slices.Sort(values)
		return values[len(values)/2]
	}
	return median(samples[:n]), median(samples[len(samples)-n:])
}

// uses are what must not grow, with what it may grow by beside a half; peak: at no time, for
// a process that is started anew hides what the one before has leaked.
var uses = []struct {
	name string
	of   func(sample) int
	room int
	peak bool
}{
	{"goroutines", func(s sample) int { return s.goroutines }, 40, true},
	{"file descriptors", func(s sample) int { return s.descriptors }, 15, true},
	{"MiB resident", func(s sample) int { return s.residentMiB }, 60, false},
}

// peak is the most that was used.
func peak(samples []sample, of func(sample) int) int {
	return of(slices.MaxFunc(samples, func(a, b sample) int { return cmp.Compare(of(a), of(b)) }))
}

// flat returns an error where a role uses more at the end than at the beginning.
func (f *fleet) flat() error {
	var errs []error
	for _, role := range slices.Sorted(maps.Keys(f.samples)) {
		for _, use := range uses {
			first, later := quarters(f.samples[role], use.of)
			if use.peak {
				later = peak(f.samples[role], use.of)
			}
			if later > first+first/2+use.room {
				errs = append(errs, fmt.Errorf("%s: %d %s in the first quarter, %d later", role, first, use.name, later))
			}
		}
	}
	return errors.Join(errs...)
}

// tell says what was used.
func (f *fleet) tell(say func(string, ...any)) {
	for _, role := range slices.Sorted(maps.Keys(f.samples)) {
		var parts []string
		for _, use := range uses {
			first, last := quarters(f.samples[role], use.of)
			parts = append(parts, fmt.Sprintf("%s %d, %d (at most %d)", use.name, first, last, peak(f.samples[role], use.of)))
		}
		say("%-13s first and last quarter: %s", role, strings.Join(parts, "; "))
	}
}

// suspicious is what no log may hold.
var suspicious = regexp.MustCompile(`level=ERROR|DATA RACE|panic|fatal error`)

// readLogs looks at everything that imps has logged.
func (f *fleet) readLogs() error {
	var errs []error
	for _, m := range f.members {
		text := m.process.Log()
		if at := suspicious.FindStringIndex(text); at != nil {
			errs = append(errs, fmt.Errorf("the log of %s has:\n%s", m.name, text[at[0]:min(len(text), at[0]+4000)]))
		}
		errs = append(errs, findCanary("the log of "+m.name, text))
	}
	return errors.Join(errs...)
}

func tail(text string) string { return text[max(0, len(text)-4000):] }

// suspend stops a process as a machine that is put to sleep does.
func (s *soak) suspend(m *member, slot string, steps int, d time.Duration) error {
	s.later("continue "+m.name, slot, steps, d, func(context.Context) error { return m.process.Signal(syscall.SIGCONT) })
	return m.process.Signal(syscall.SIGSTOP)
}

// restart ends processes, and starts them again later.
func (s *soak) restart(slot string, crash bool, steps int, d time.Duration, members ...*member) error {
	var errs []error
	for _, m := range members {
		errs = append(errs, m.end(crash))
		s.later("start "+m.name, slot, steps, d, m.run)
	}
	return errors.Join(errs...)
}
