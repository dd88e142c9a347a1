package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"time"

	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"

	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

const (
	// patience bounds every wait; the machine may be small, and shared.
	patience = 10 * time.Minute
	// clients is how many requests the simulation itself has in flight.
	clients = 32
	// longestRetryAfter is a little more than what the API server answers at most with 429.
	longestRetryAfter = 33 * time.Second
	// spareDescriptors are the files and connections beside those of the agents.
	spareDescriptors = 500
)

// config is the size of a simulation.
type config struct {
	Agents     int           `json:"agents"`
	Namespaces int           `json:"namespaces"`
	Pods       int           `json:"pods"`
	Waiting    int           `json:"waiting"`
	Resources  int           `json:"resources"`
	Reports    int           `json:"reports"`
	NewPods    int           `json:"newPods"`
	Restarts   int           `json:"restarts"`
	Batch      int           `json:"batch"`
	Idle       time.Duration `json:"idleNanoseconds"`
	// root is the repository's folder.
	root string
	// quiet is how long imps must have asked nothing for a phase to be over.
	quiet time.Duration
}

func (c config) validate() error {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("read the limit of open files: %w", err)
	}
	switch {
	case c.Agents < 1 || c.Namespaces < 2 || c.Pods < 1 || c.Resources < 1 || c.Batch < 1:
		return errors.New("there must be an agent, two namespaces, a Pod, a resource and a batch at least")
	case c.Waiting < 0 || c.Waiting > c.Pods || c.Pods > c.Namespaces:
		return errors.New("no more Pods of a node can wait than there are, and no more be there than namespaces")
	case c.NewPods < 0 || c.NewPods > c.Agents || c.Restarts < 0 || c.Reports < 0 || c.Idle < 0:
		return errors.New("no more nodes can get a new Pod than there are; and nothing is less than zero")
	case limit.Cur < uint64(c.Agents+spareDescriptors):
		return fmt.Errorf("each agent needs a connection, and only %d files may be open at once: raise ulimit -n", limit.Cur)
	}
	return nil
}

// simulation is one run.
type simulation struct {
	config
	progress io.Writer
	begin    time.Time
	result   *result

	control  *cluster.Cluster
	core     kubernetes.Interface
	dynamic  dynamic.Interface
	metadata metadata.Interface
	// dir holds the binary, the coordinator's kubeconfig and its log.
	dir     string
	watcher *watcher

	coordinator coordinator
	agents      []*agent
	traffic     traffic // of all agents
	warnings    warnings
	// apiServer is the API server's process id.
	apiServer int
}

// simulate runs all phases and removes everything that they made. Also with an error it
// returns what was found until then.
func simulate(ctx context.Context, c config, progress io.Writer) (_ *result, err error) {
	s := &simulation{config: c, progress: progress, begin: time.Now(), result: &result{Config: c, Processors: runtime.NumCPU()}}
	defer func() { err = errors.Join(err, s.end()) }()
	if err := s.setUp(ctx); err != nil {
		return s.result, fmt.Errorf("set up: %w", err)
	}
	for _, p := range s.plan() {
		if err := s.play(ctx, p); err != nil {
			return s.result, fmt.Errorf("%s: %w", p.name, err)
		}
	}
	if err := s.weigh(ctx); err != nil {
		return s.result, err
	}
	return s.result, nil
}

// say reports progress.
func (s *simulation) say(format string, args ...any) {
	// A line that cannot be written must not end the run.
	_, _ = fmt.Fprintf(s.progress, "%6.1f s  %s\n", time.Since(s.begin).Seconds(), fmt.Sprintf(format, args...))
}

// end stops and removes everything, however far the run came.
func (s *simulation) end() error {
	if s.control == nil {
		return nil
	}
	var errs []error
	errs = append(errs, s.stopAgents(s.agents))
	if s.coordinator.process != nil {
		errs = append(errs, s.coordinator.end())
	}
	if s.watcher != nil {
		s.watcher.stop()
	}
	return errors.Join(append(errs, s.control.Stop())...)
}

// planned is a phase to come.
type planned struct {
	name string
	run  func(context.Context, *phase) error
	// check says what was not as it must be.
	check func(*phase)
}

// play runs one phase and waits until imps is quiet again; then it counts.
func (s *simulation) play(ctx context.Context, next planned) error {
	s.say("%s", next.name)
	mark, err := s.mark(ctx)
	if err != nil {
		return err
	}
	p := &phase{Name: next.name}
	seen := s.watcher.len()
	before, err := s.measure(true)
	if err != nil {
		return err
	}
	begin := time.Now()
	if err := next.run(ctx, p); err != nil {
		return err
	}
	if err := s.quieten(ctx, mark); err != nil {
		return err
	}
	p.Seconds = time.Since(begin).Seconds()
	after, err := s.measure(false)
	if err != nil {
		return err
	}
	p.Usage.add(after, before)
	events, err := s.control.Audit().Since(mark)
	if err != nil {
		return err
	}
	p.count(events)
	p.Changes = s.watcher.since(seen).kinds()
	if next.check != nil {
		next.check(p)
	}
	warnings := s.warnings.take()
	if len(warnings) > 0 {
		p.figure("warnings of agents", float64(len(warnings)), "")
	}
	s.result.Phases = append(s.result.Phases, p)
	s.say("  %s", p)
	for _, warning := range warnings[:min(len(warnings), 3)] {
		s.say("  for instance: %s", warning)
	}
	return nil
}

// fault notes what is not as it must be.
func (s *simulation) fault(p *phase, format string, args ...any) {
	s.result.Faults = append(s.result.Faults, p.Name+": "+fmt.Sprintf(format, args...))
}

// expect notes a fault where a number is not the one that it must be.
func (s *simulation) expect(p *phase, what string, want, got int) {
	if got != want {
		s.fault(p, "%s: %d, not %d", what, got, want)
	}
}

// mark returns the end of the audit log, at the end of a line: another client's event may be
// half written.
func (s *simulation) mark(ctx context.Context) (cluster.Mark, error) {
	mark := s.control.Audit().Mark()
	err := s.await(ctx, "the audit log rests", 20*time.Millisecond, func() (bool, error) {
		was := mark
		mark = s.control.Audit().Mark()
		return mark == was, nil
	})
	return mark, err
}

// quieten waits until imps has asked for nothing for a while. The Lease does not count, and
// watches that go on neither: each ends after some minutes, at any time. Where the API server
// has refused requests since the mark, the while is as long as it may have them wait.
func (s *simulation) quieten(ctx context.Context, since cluster.Mark) error {
	mark, err := s.mark(ctx)
	if err != nil {
		return err
	}
	events, err := s.control.Audit().Since(since)
	if err != nil {
		return err
	}
	quiet := s.quiet
	if slices.ContainsFunc(events, func(e cluster.Event) bool { return e.Code == http.StatusTooManyRequests }) {
		quiet = max(quiet, longestRetryAfter)
	}
	last := time.Now()
	return s.await(ctx, "imps is quiet", 200*time.Millisecond, func() (bool, error) {
		events, err := s.control.Audit().Since(mark)
		if err != nil {
			return false, err
		}
		for _, e := range events {
			r := requestOf(e)
			if !isEndOfWatch(e) && r.User != other && r.What != "leases" && r.Verb != watchOn && e.Written.After(last) {
				last = e.Written
			}
		}
		return time.Since(last) > quiet, nil
	})
}

// await repeats a look until it finds what is waited for, or patience is at an end.
func (s *simulation) await(ctx context.Context, what string, interval time.Duration, look func() (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("not within %s", patience))
	defer cancel()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		if done, err := look(); done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait until %s: %w", what, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// measure reads what the processes use; reset begins the peaks anew.
func (s *simulation) measure(reset bool) (usages, error) {
	var u usages
	var err error
	if u.APIServer, err = usageOf(s.apiServer, reset); err != nil {
		return u, err
	}
	if u.Agents, err = usageOf(os.Getpid(), reset); err != nil {
		return u, err
	}
	u.Agents.ReceivedBytes, u.Agents.SentBytes = s.traffic.received.Load(), s.traffic.sent.Load()
	if s.coordinator.pid != 0 {
		u.Coordinator, err = s.coordinator.usage(reset)
	}
	return u, err
}

// coordinator is the coordinator's process, as it is after any number of restarts.
type coordinator struct {
	spec    imps.Spec
	process *imps.Process
	pid     int
	// ended is what the processes before it have used.
	ended usage
}

// usage is that of the present process, with the work of those before it.
func (c *coordinator) usage(reset bool) (usage, error) {
	u, err := usageOf(c.pid, reset)
	u.CPUSeconds += c.ended.CPUSeconds
	u.ReceivedBytes += c.ended.ReceivedBytes
	u.SentBytes += c.ended.SentBytes
	return u, err
}

// end ends it as Kubernetes does, where it runs.
func (c *coordinator) end() error {
	select {
	case <-c.process.Ended():
		return nil
	default:
		return c.process.Terminate()
	}
}

// startCoordinator starts it, and waits until it leads and has read everything.
func (s *simulation) startCoordinator(ctx context.Context) error {
	// It is ended in order, also where the run is broken off.
	process, err := imps.Start(context.WithoutCancel(ctx), s.control, filepath.Join(s.dir, "imps-node"), s.dir, s.coordinator.spec)
	if err != nil {
		return err
	}
	s.coordinator.process = process
	if err := process.AwaitReady(ctx); err != nil {
		return err
	}
	s.coordinator.pid, err = findProcess(s.dir, "imps-node")
	return err
}
