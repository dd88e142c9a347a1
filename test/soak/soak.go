package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/imps"
)

const (
	// linger replaces the minute that a Secret stays after the last Pod.
	linger = 2 * time.Second
	// callTimeout bounds one request of the soak's own.
	callTimeout = 10 * time.Second
	// within bounds everything that should only take moments.
	within = time.Minute
	// collectorPatience is for how long the garbage collector may orphan what belonged to a
	// resource.
	collectorPatience = 15 * time.Second
	// changesInWindow are at least so many, and at most so many more, between two quiet
	// points; faultsInWindow are the faults among them.
	changesInWindow, moreChanges, faultsInWindow = 8, 32, 4
	// recentActions are what a failure shows.
	recentActions = 30
)

// config says how long and what.
type config struct {
	duration time.Duration
	seed     uint64
	logLevel string
	out      io.Writer
}

// soak is one run.
type soak struct {
	config
	*world
	control *cluster.Cluster
	proxy   *cluster.Proxy
	core    kubernetes.Interface
	dynamic dynamic.Interface
	random  *rand.Rand
	// dir holds the binary, the kubeconfigs and the logs of imps.
	dir   string
	fleet fleet

	changes, faults *deck
	pending         []*heal
	step            int
	played          map[string]int
	// actions are all that was done, and log is where they are written to as well.
	actions []string
	log     *os.File
	began   time.Time
	// windowBegan is where the audit log of the changes since the last quiet point begins.
	windowBegan cluster.Mark
	settled     []time.Duration // how long each quiet point took to come
	unknown     int             // deletions that nobody is known to have asked for
	// collectorHelped is when the garbage collector was last helped, of collectorHelps times.
	collectorHelped time.Time
	collectorHelps  int

	mu   sync.Mutex
	line string // of progress
}

// run soaks for as long as it is told and returns what it found wrong.
func run(ctx context.Context, c config) (err error) {
	//nolint:gosec // the same seed has to make the same steps
	s := &soak{config: c, random: rand.New(rand.NewPCG(c.seed, c.seed)), played: map[string]int{}, world: &world{
		namespaces: map[string]*namespace{}, pods: map[string]*pod{}, sources: map[string]*source{}, resources: map[string]*resource{},
		foreign: map[key]foreign{}, gone: map[string]bool{}, keep: map[key]*kept{}, left: map[types.UID]bool{}, unmanaged: map[types.UID]bool{},
		window: window{garbled: map[string]bool{}},
	}}
	s.changes, s.faults = newDeck(changes()), newDeck(faults())
	s.say("seed %d, for %s", c.seed, c.duration)
	ctx, cancel := context.WithCancel(ctx)
	defer func() {
		cancel()
		interrupted := errors.Is(err, context.Canceled)
		err = errors.Join(err, s.cleanUp(err != nil && !interrupted))
	}()
	if err := s.setUp(ctx); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	s.began = time.Now()
	stop := s.showProgress()
	err = s.play(ctx)
	stop()
	if err == nil {
		err = s.end()
	}
	s.tellCounts()
	if errors.Is(err, context.Canceled) {
		return fmt.Errorf("interrupted: %w", err)
	}
	if err != nil {
		return s.explain(err)
	}
	s.say("all well after %d steps and %d quiet points", s.step, len(s.settled))
	return nil
}

// setUp starts the control plane and imps.
func (s *soak) setUp(ctx context.Context) error {
	root, err := imps.Root(ctx)
	if err != nil {
		return err
	}
	if s.dir, err = os.MkdirTemp("", "imps-soak-"); err != nil {
		return err
	}
	if s.log, err = os.Create(filepath.Join(s.dir, "actions.log")); err != nil {
		return err
	}
	if s.control, err = cluster.Run(ctx, cluster.WithProgress(s.out)); err != nil {
		return err
	}
	err = imps.Install(ctx, root, s.control, "targetSecretNames={"+strings.Join(targets, ",")+"}", "excludedNamespaces={kube-*,excluded-*}")
	if err != nil {
		return err
	}
	if s.proxy, err = s.control.Proxy(ctx); err != nil {
		return err
	}
	binary, err := imps.Build(ctx, root, s.dir, "-race")
	if err != nil {
		return err
	}
	client := s.control.Admin()
	client.Timeout = callTimeout
	if s.core, err = kubernetes.NewForConfig(client); err != nil {
		return err
	}
	if s.dynamic, err = dynamic.NewForConfig(client); err != nil {
		return err
	}
	if err := s.recruit(ctx, binary); err != nil {
		return err
	}
	return s.firstSight(ctx)
}

// firstSight takes what is there already into the model, and makes what the soak begins with.
func (s *soak) firstSight(ctx context.Context) error {
	there, err := s.core.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, n := range there.Items {
		s.namespaces[n.Name] = &namespace{name: n.Name, labels: n.Labels, annotations: n.Annotations, fixed: true}
	}
	pods, err := s.core.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, p := range pods.Items {
		if p.Spec.NodeName != "" {
			s.pods[p.Name] = &pod{name: p.Name, namespace: p.Namespace, node: p.Spec.NodeName, labels: p.Labels, annotations: p.Annotations, fixed: true}
		}
	}
	for i := range 12 {
		s.freeNamespaces = append(s.freeNamespaces, fmt.Sprintf("ns-%d", i))
	}
	s.freeNamespaces = slices.Insert(s.freeNamespaces, 3, "excluded-a")
	for i := range 7 {
		s.freeResources = append(s.freeResources, fmt.Sprintf("resource-%d", i))
	}
	for i := range 5 {
		name := fmt.Sprintf("source-%d", i)
		s.sources[name] = &source{name: name, config: map[int]map[string]string{}}
	}
	s.windowBegan = s.control.Audit().Mark()
	for _, change := range []func(context.Context, *soak) (string, error){
		restoreSource, restoreSource, restoreSource, restoreSource,
		createNamespace, createNamespace, createNamespace, createNamespace, createNamespace, createNamespace, createNamespace,
		createPod, createPod, createPod, createPod, createPod, createResource, createResource, createResource, createPod,
	} {
		what, err := change(ctx, s)
		if err != nil {
			return err
		}
		s.note("begin", what)
	}
	return nil
}

// play goes through windows of changes and faults with a quiet point after each.
func (s *soak) play(ctx context.Context) error {
	if err := s.quiet(ctx); err != nil {
		return err
	}
	for time.Since(s.began) < s.duration || s.unplayed() != "" {
		if err := s.trouble(ctx); err != nil {
			return err
		}
		if err := s.quiet(ctx); err != nil {
			return err
		}
	}
	return nil
}

// trouble is one window: changes and faults in a random order, at short intervals.
func (s *soak) trouble(ctx context.Context) error {
	turns := append(slices.Repeat([]*deck{s.changes}, changesInWindow+s.random.IntN(moreChanges)), slices.Repeat([]*deck{s.faults}, faultsInWindow)...)
	s.random.Shuffle(len(turns), func(i, j int) { turns[i], turns[j] = turns[j], turns[i] })
	for i, d := range turns {
		s.step++
		if err := s.healDue(ctx, false); err != nil {
			return err
		}
		if err := s.draw(ctx, d); err != nil {
			return err
		}
		s.narrow()
		if err := s.fleet.alive(); err != nil {
			return err
		}
		if i%8 == 7 {
			if err := s.glance(ctx); err != nil {
				return err
			}
		}
		if err := pause(ctx, time.Duration(10+s.random.IntN(300))*time.Millisecond); err != nil {
			return err
		}
	}
	return s.healDue(ctx, true)
}

// draw plays the next card that there is something to do for; the others stay in the deck.
func (s *soak) draw(ctx context.Context, d *deck) error {
	for i := range 2 * d.size {
		c := d.peek(i, s.random)
		what, err := c.play(ctx, s)
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		if what == "" {
			continue
		}
		d.left = slices.Delete(d.left, i, i+1)
		s.played[c.name]++
		s.note(c.name, what)
		return nil
	}
	return errors.New("there is nothing left to do")
}

// heal is the end of a fault.
type heal struct {
	name string
	// slot is what the fault is about: one fault at a time.
	slot string
	step int       // not before this one
	at   time.Time // nor before this time
	do   func(context.Context) error
}

// later ends a fault that has begun, after some steps and some time.
func (s *soak) later(name, slot string, steps int, after time.Duration, do func(context.Context) error) {
	s.pending = append(s.pending, &heal{name, slot, s.step + steps, time.Now().Add(after), do})
}

// free reports whether nothing is wrong with a slot already.
func (s *soak) free(slot string) bool {
	return !slices.ContainsFunc(s.pending, func(h *heal) bool { return h.slot == slot })
}

// healDue ends the faults whose step has come, or all.
func (s *soak) healDue(ctx context.Context, all bool) error {
	pending := s.pending
	s.pending = nil
	for _, h := range pending {
		if h.step > s.step && !all {
			s.pending = append(s.pending, h)
			continue
		}
		if err := pause(ctx, time.Until(h.at)); err != nil {
			return err
		}
		if err := h.do(ctx); err != nil {
			return fmt.Errorf("%s: %w", h.name, err)
		}
		s.note("heal", h.name)
	}
	return nil
}

// card is a kind of change or fault.
type card struct {
	name string
	// times is how often it is in the deck.
	times int
	// play does it to something that the generator chooses, and says to what; "" where
	// there is nothing to do it to.
	play func(context.Context, *soak) (string, error)
}

// deck deals every card before any comes again.
type deck struct {
	cards []card
	size  int // with each card as often as it says
	left  []int
}

func newDeck(cards []card) *deck {
	d := &deck{cards: cards}
	for _, c := range cards {
		d.size += c.times
	}
	return d
}

// peek returns the i-th card that is left. Where there are not so many, they are dealt anew.
func (d *deck) peek(i int, random *rand.Rand) card {
	if i == len(d.left) {
		for n, c := range d.cards {
			d.left = append(d.left, slices.Repeat([]int{n}, c.times)...)
		}
		dealt := d.left[i:]
		random.Shuffle(len(dealt), func(a, b int) { dealt[a], dealt[b] = dealt[b], dealt[a] })
	}
	return d.cards[d.left[i]]
}

// unplayed is a card that was not played yet.
func (s *soak) unplayed() string {
	for _, c := range slices.Concat(s.changes.cards, s.faults.cards) {
		if s.played[c.name] == 0 {
			return c.name
		}
	}
	return ""
}

// note records what was done.
func (s *soak) note(name, what string) {
	action := fmt.Sprintf("%6.1f s  step %d  %s: %s", time.Since(s.began).Seconds(), s.step, name, what)
	s.actions = append(s.actions, action)
	if s.log != nil {
		_, _ = fmt.Fprintln(s.log, action) // for people only
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.line = fmt.Sprintf("step %d, %d quiet points; last: %s: %s", s.step, len(s.settled), name, what)
}

func (s *soak) say(format string, args ...any) {
	_, _ = fmt.Fprintf(s.out, format+"\n", args...) // nobody to tell that nobody reads
}

// showProgress prints a line each ten seconds until it is stopped.
func (s *soak) showProgress() (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(10 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-quit:
				return
			case <-tick.C:
				s.mu.Lock()
				line := s.line
				s.mu.Unlock()
				s.say("%4.0f s  %s", time.Since(s.began).Seconds(), line)
			}
		}
	}()
	return func() { close(quit); <-done }
}

// explain puts all that is needed to find out into an error.
func (s *soak) explain(err error) error {
	var text strings.Builder
	_, _ = fmt.Fprintf(&text, "seed %d, step %d\nlast actions:\n", s.seed, s.step)
	for _, action := range s.actions[max(0, len(s.actions)-recentActions):] {
		text.WriteString("  " + action + "\n")
	}
	_, _ = fmt.Fprintf(&text, "all logs and actions are in %s\nwhat is wrong:\n", s.dir)
	return fmt.Errorf("%s%w", text.String(), err)
}

// tellCounts says how often everything was done, and how long imps took.
func (s *soak) tellCounts() {
	s.say("played:")
	for _, c := range slices.Concat(s.changes.cards, s.faults.cards) {
		s.say("  %4d  %s", s.played[c.name], c.name)
	}
	if len(s.settled) > 0 {
		sorted := slices.Sorted(slices.Values(s.settled))
		s.say("all was right after %.1f s (median), %.1f s (at most); %d deletions that the audit log lost in a crash",
			sorted[len(sorted)/2].Seconds(), sorted[len(sorted)-1].Seconds(), s.unknown)
	}
	s.say("%d times the garbage collector could not go on by itself", s.collectorHelps)
	s.fleet.tell(s.say)
}

// end stops imps, which must end in order, and looks at the logs once more.
func (s *soak) end() error {
	return errors.Join(s.fleet.stop(), s.fleet.readLogs(), s.fleet.flat())
}

// cleanUp ends everything. Where something was wrong, the logs stay.
func (s *soak) cleanUp(failed bool) error {
	s.fleet.kill()
	var errs []error
	if failed && s.control != nil {
		errs = append(errs, s.keepLogs())
	}
	if s.proxy != nil {
		errs = append(errs, s.proxy.Close())
	}
	if s.control != nil {
		errs = append(errs, s.control.Stop())
	}
	if s.log != nil {
		errs = append(errs, s.log.Close())
	}
	if s.dir != "" && !failed {
		errs = append(errs, os.RemoveAll(s.dir))
	}
	return errors.Join(errs...)
}

// keepLogs saves the control plane's logs, which go with it otherwise.
func (s *soak) keepLogs() error {
	logs, err := filepath.Glob(filepath.Join(s.control.Dir(), "*.log"))
	for _, log := range logs {
		text, readErr := os.ReadFile(log)                                                                    //nolint:gosec // of the control plane that was started here
		err = errors.Join(err, readErr, os.WriteFile(filepath.Join(s.dir, filepath.Base(log)), text, 0o600)) //nolint:gosec // of this run
	}
	return err
}

// until repeats what may fail while the API server recovers; an error that final knows is
// returned at once.
func until(ctx context.Context, what string, try func(context.Context) error, final ...func(error) bool) error {
	deadline := time.Now().Add(within)
	for {
		err := try(ctx)
		if err == nil || ignore(err, final...) == nil {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: %w", what, err)
		}
		if err := pause(ctx, 25*time.Millisecond); err != nil {
			return err
		}
	}
}

// pause lets some time pass.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(max(d, 0))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// pick returns one of a list, the zero value of an empty one.
func pick[T any](s *soak, list []T) (one T) {
	if len(list) == 0 {
		return one
	}
	return list[s.random.IntN(len(list))]
}

// names returns the keys of what passes a test, sorted, so that the same seed picks the same.
func names[T any](m map[string]T, test func(T) bool) []string {
	var list []string
	for _, name := range slices.Sorted(maps.Keys(m)) {
		if test(m[name]) {
			list = append(list, name)
		}
	}
	return list
}

func (s *soak) images() dynamic.ResourceInterface { return s.dynamic.Resource(v1alpha1.Resource) }
