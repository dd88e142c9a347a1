// Package node is the node duty: it watches the Pods of one node, creates the pull Secret
// that a waiting Pod needs where it is absent, and reports which namespaces the Pods of
// the node select.
//
// It never changes or deletes a Secret, and reads none but the rendered ones.
package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/workqueue"

	"github.com/imps-node/imps/pkg/dockerconfig"
	"github.com/imps-node/imps/pkg/nodecache"
	impsync "github.com/imps-node/imps/pkg/sync"
)

const (
	// duty is this package's name in metrics and logs.
	duty = "node"
	// workers bound the requests in flight of one node.
	workers = 8
	// reportInterval is the shortest time between two writes of the report.
	reportInterval = time.Second
	// reportLongest is how long a report waits that cannot be written: less than a Secret
	// stays that nothing demands.
	reportLongest = 15 * time.Second
	// failuresToTell is how often in a row a namespace fails before the log tells: some
	// seconds.
	failuresToTell = 7
)

// Config is what an Agent needs.
type Config struct {
	// NodeName is the node whose Pods are served.
	NodeName string
	// Namespace holds the node report, RenderedNamespace the rendered Secrets.
	Namespace         string
	RenderedNamespace string
	// Excluded namespaces are never served.
	Excluded impsync.Exclusion
	// FormatVersions are the versions of the rendered form that it reads;
	// impsync.FormatVersions where it is nil.
	FormatVersions []int
	// CacheDir is the folder of the node cache, which the kubelet's credential provider answers from; empty for none.
	CacheDir string
	// Client is the connection to the API server, with the agent's own identity.
	Client   *rest.Config
	Metrics  *impsync.Metrics
	Registry prometheus.Registerer
	Log      *slog.Logger
}

// Agent is the node duty.
type Agent struct {
	config   Config
	log      *slog.Logger
	core     corev1client.CoreV1Interface
	metadata metadata.Interface
	secrets  *impsync.Secrets
	fastPath prometheus.Histogram

	pods     *impsync.Mirror[pod]
	rendered *impsync.Mirror[renderedSecret]
	report   *impsync.Mirror[string]
	// queue holds namespaces with Pods that may wait for a Secret.
	queue workqueue.TypedRateLimitingInterface[string]
	// refused is when those come back that the API server refused to write to.
	refused workqueue.TypedRateLimiter[string]
	// reportDirty holds a token while the report may need a write.
	reportDirty chan struct{}
	// cacheDirty holds a token while the node cache may need a write.
	cacheDirty chan struct{}
	ready      chan struct{}
	serverTime atomic.Pointer[serverTime]

	mu sync.Mutex
	// active is the last readable form of every rendered Secret, by its name.
	active map[string]*selecting
	// seen is when each Pod that waits was seen first.
	seen map[types.NamespacedName]time.Time
	// namespaces are those with Pods here that wait, and, where there is a node cache, that live: no other namespace's rules
	// matter.
	namespaces map[string]*namespace
	// cacheProblem is why the node cache is not as it should be, empty where it is; nil before the first try.
	cacheProblem *string
	// watchNamespace starts the watch of one namespace, and returns what ends it. Run sets it.
	watchNamespace func(name string, ns *namespace) context.CancelFunc
}

// pod is what is kept of a Pod.
type pod struct {
	uid                 types.UID
	labels, annotations map[string]string
	// waiting: it has a container whose image may still have to be pulled.
	waiting bool
	// live: it may pull an image, now or once more.
	live bool
	// refused are images of it that it may not pull, and pullSecrets what it names then.
	refused, pullSecrets []string
}

// renderedSecret is what is kept of a rendered Secret.
type renderedSecret struct {
	rendered impsync.Rendered
	deleting bool
	// foreign: it is none, whatever put it there.
	foreign bool
	err     error
}

// selecting is a rendered Secret and its compiled selectors.
type selecting struct {
	impsync.Rendered
	selection *impsync.Selection
	// credentials are what the Secret holds, where the resource asks for rescue, or for kubelets.
	credentials dockerconfig.Config
	// entries are those, for the node cache.
	entries []nodecache.Entry
}

// namespace is a namespace with Pods on this node that wait.
type namespace struct {
	waiting, live int
	// stop ends its watch; nil where it is not watched, since nothing depends on its labels
	// and annotations.
	stop context.CancelFunc
	// known is the last metadata that was read; nil before.
	known *namespaceMeta
	// failed: it was asked for in vain, and the watch may bring it before the next try.
	failed bool
}

type namespaceMeta struct {
	labels, annotations map[string]string
	terminating         bool
}

func (m *namespaceMeta) equal(other *namespaceMeta) bool {
	return m.terminating == other.terminating && maps.Equal(m.labels, other.labels) && maps.Equal(m.annotations, other.annotations)
}

// New returns an Agent that starts with Run.
func New(config Config) (*Agent, error) {
	switch {
	case config.NodeName == "":
		return nil, errors.New("the node duty needs the name of its node: set --node-name or NODE_NAME")
	case config.Namespace == "" || config.RenderedNamespace == "":
		return nil, errors.New("the node duty needs the namespaces of its report and of the rendered Secrets")
	}
	if config.FormatVersions == nil {
		config.FormatVersions = impsync.FormatVersions()
	}
	a := &Agent{
		config:      config,
		log:         config.Log.With("duty", duty),
		reportDirty: make(chan struct{}, 1),
		cacheDirty:  make(chan struct{}, 1),
		ready:       make(chan struct{}),
		active:      map[string]*selecting{},
		refused:     workqueue.NewTypedItemExponentialFailureRateLimiter[string](impsync.RecheckSoonest, impsync.RecheckInterval),
		seen:        map[types.NamespacedName]time.Time{},
		namespaces:  map[string]*namespace{},
		fastPath: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:    "imps_fast_path_seconds",
			Help:    "From the moment the agent first saw the longest waiting Pod of a namespace to the moment it has created the Secret.",
			Buckets: []float64{.001, .002, .005, .01, .02, .04, .08, .16, .32, 1, 5, 30},
		}),
	}
	if config.CacheDir != "" {
		config.Client = rest.CopyConfig(config.Client)
		config.Client.Wrap(a.dated)
	}
	connection, err := rest.HTTPClientFor(config.Client)
	if err != nil {
		return nil, fmt.Errorf("connection to the API server: %w", err)
	}
	if a.core, err = corev1client.NewForConfigAndClient(impsync.Protobuf(config.Client), connection); err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	if a.metadata, err = metadata.NewForConfigAndClient(config.Client, connection); err != nil {
		return nil, fmt.Errorf("metadata client: %w", err)
	}
	if a.secrets, err = impsync.NewSecrets(config.Client, connection); err != nil {
		return nil, err
	}
	if err := config.Registry.Register(a.fastPath); err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	a.pods = impsync.NewMirror(impsync.MirrorConfig[pod]{
		Name: "pods of the node", Example: &corev1.Pod{}, Log: a.log,
		ListWatch: impsync.TypedListWatch(a.core.Pods("").List, a.core.Pods("").Watch,
			metav1.ListOptions{FieldSelector: "spec.nodeName=" + config.NodeName}),
		Convert:  convertPod,
		OnChange: a.podChanged,
	})
	a.rendered = impsync.NewMirror(impsync.MirrorConfig[renderedSecret]{
		Name: "rendered Secrets", Example: &corev1.Secret{}, Log: a.log,
		ListWatch: impsync.TypedListWatch(a.core.Secrets(config.RenderedNamespace).List, a.core.Secrets(config.RenderedNamespace).Watch, metav1.ListOptions{}),
		Convert:   a.convertRendered,
		OnChange:  a.renderedChanged,
	})
	a.report = impsync.NewMirror(impsync.MirrorConfig[string]{
		Name: "node report", Example: &corev1.ConfigMap{}, Log: a.log,
		ListWatch: impsync.TypedListWatch(a.core.ConfigMaps(config.Namespace).List, a.core.ConfigMaps(config.Namespace).Watch,
			metav1.ListOptions{FieldSelector: metav1.ObjectNameField + "=" + impsync.ReportName(config.NodeName)}),
		Convert:  func(o runtime.Object) string { return o.(*corev1.ConfigMap).Data[impsync.ReportKey] },
		OnChange: func(types.NamespacedName, *string, *string) { a.dirty() },
	})
	return a, nil
}

// Ready returns nil once the agent has seen its Pods, the rendered Secrets and its report.
func (a *Agent) Ready() error {
	select {
	case <-a.ready:
		return nil
	default:
		return errors.New("the node duty has not read its Pods, the rendered Secrets and its report yet")
	}
}

// Run serves the node until ctx ends; then it finishes what is in flight. An Agent runs once.
func (a *Agent) Run(ctx context.Context) error {
	a.queue = workqueue.NewTypedRateLimitingQueueWithConfig(
		workqueue.NewTypedItemExponentialFailureRateLimiter[string](50*time.Millisecond, time.Minute),
		workqueue.TypedRateLimitingQueueConfig[string]{Name: "node-namespaces"})
	ctx, cancel := context.WithCancelCause(ctx)
	work, stop := impsync.WithGrace(ctx)
	defer stop()
	var watches sync.WaitGroup
	defer func() {
		cancel(nil)
		watches.Wait()
	}()
	a.watchNamespace = func(name string, ns *namespace) context.CancelFunc {
		ctx, stop := context.WithCancel(ctx)
		mirror := a.namespaceMirror(ctx, name, ns)
		watches.Go(func() {
			err := impsync.RunTasks(ctx, func(ctx context.Context) error { mirror.Run(ctx); return nil })
			if err != nil {
				cancel(err)
			}
		})
		return stop
	}

	tasks := []func(context.Context) error{
		func(ctx context.Context) error { a.pods.Run(ctx); return nil },
		func(ctx context.Context) error { a.rendered.Run(ctx); return nil },
		func(ctx context.Context) error { a.report.Run(ctx); return nil },
		func(ctx context.Context) error {
			if a.config.CacheDir == "" {
				return nil
			}
			return a.keepCache(ctx)
		},
		func(ctx context.Context) error {
			<-ctx.Done()
			a.queue.ShutDown()
			return nil
		},
		func(ctx context.Context) error {
			for _, synced := range []<-chan struct{}{a.pods.Synced(), a.rendered.Synced(), a.report.Synced()} {
				select {
				case <-synced:
				case <-ctx.Done():
					return nil
				}
			}
			close(a.ready)
			a.dirty() // also a node without Pods has a report: it says that there is an agent
			a.log.Info("serving", "node", a.config.NodeName)
			serve := []func(context.Context) error{func(ctx context.Context) error { return a.keepReport(ctx, work) }}
			for range workers {
				serve = append(serve, func(ctx context.Context) error {
					for a.next(ctx, work) {
					}
					return nil
				})
			}
			return impsync.RunTasks(ctx, serve...)
		},
	}
	err := impsync.RunTasks(ctx, tasks...)
	if cause := context.Cause(ctx); err == nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

func convertPod(o runtime.Object) pod {
	p := o.(*corev1.Pod)
	kept := pod{uid: p.UID, labels: p.Labels, annotations: p.Annotations, waiting: isWaiting(p), live: !ended(p), refused: impsync.RefusedImages(p)}
	if len(kept.refused) > 0 {
		kept.pullSecrets = impsync.PullSecrets(p.Spec.ImagePullSecrets)
	}
	return kept
}

// isWaiting reports whether an image of the Pod may still have to be pulled: a container
// that neither runs nor ever ran.
func isWaiting(p *corev1.Pod) bool {
	if ended(p) {
		return false
	}
	started := 0
	for _, statuses := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses} {
		for i := range statuses {
			s := &statuses[i]
			if s.State.Running != nil || s.State.Terminated != nil || s.LastTerminationState.Terminated != nil {
				started++
			}
		}
	}
	return started < len(p.Spec.InitContainers)+len(p.Spec.Containers)
}

// ended reports whether the Pod will pull no image any more.
func ended(p *corev1.Pod) bool {
	return p.DeletionTimestamp != nil || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

func (a *Agent) convertRendered(o runtime.Object) renderedSecret {
	s := o.(*corev1.Secret)
	rendered, err := impsync.DecodeRendered(s, a.config.FormatVersions)
	foreign := s.Type != impsync.RenderedType || impsync.RenderedName(impsync.UIDOfRendered(s.Name)) != s.Name
	return renderedSecret{rendered: rendered, deleting: s.DeletionTimestamp != nil, foreign: foreign, err: err}
}

func (a *Agent) podChanged(key types.NamespacedName, old, current *pod) {
	if old != nil && current != nil && old.uid != current.uid {
		// Another one of the same name, as of a StatefulSet; the end of the first was missed.
		a.podChanged(key, old, nil)
		old = nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	ns := a.namespaces[key.Namespace]
	if ns == nil {
		ns = &namespace{}
		a.namespaces[key.Namespace] = ns
	}
	waited, waits := old != nil && old.waiting, current != nil && current.waiting
	switch {
	case waits && !waited:
		ns.waiting++
		a.seen[key] = time.Now()
	case waited && !waits:
		delete(a.seen, key)
		ns.waiting--
	}
	relabelled := old == nil || current == nil || !maps.Equal(old.labels, current.labels) || !maps.Equal(old.annotations, current.annotations)
	lived, lives := old != nil && old.live, current != nil && current.live
	if a.config.CacheDir != "" {
		if lives && !lived {
			ns.live++
		} else if lived && !lives {
			ns.live--
		}
		if relabelled || lives != lived {
			a.cacheSoon()
		}
	}
	metadata := a.cacheNeedsMetadata()
	a.release(key.Namespace, ns, metadata)
	if waits && !waited || current != nil && relabelled && ns.waiting > 0 || lives && !lived && a.cacheWants(key.Namespace, ns, metadata) {
		a.queue.Add(key.Namespace) // by any Pod's labels a namespace is selected for all
	}
	if relabelled || !slices.Equal(old.refused, current.refused) {
		a.dirty()
	}
}

// release ends the watch of a namespace that nothing depends on any more, and forgets it. The metadata of those with Pods that
// live may be needed. The caller holds the lock.
func (a *Agent) release(name string, ns *namespace, needed bool) {
	if ns.waiting > 0 || ns.live > 0 && needed {
		return
	}
	if ns.stop != nil {
		ns.stop()
		ns.stop, ns.known, ns.failed = nil, nil, false
	}
	if ns.live == 0 {
		delete(a.namespaces, name)
	}
}

// releaseAll does so with all of them, as what depends on them has changed. The caller holds the lock.
func (a *Agent) releaseAll() {
	needed := a.cacheNeedsMetadata()
	for name, ns := range a.namespaces {
		a.release(name, ns, needed)
	}
}

// queueWaiting has the namespaces looked at in which a Pod waits, or that the node cache does. The caller holds the lock.
func (a *Agent) queueWaiting() {
	metadata := a.cacheNeedsMetadata()
	for name, ns := range a.namespaces {
		if ns.waiting > 0 || a.cacheWants(name, ns, metadata) {
			a.queue.Add(name)
		}
	}
}

func (a *Agent) renderedChanged(key types.NamespacedName, _, current *renderedSecret) {
	a.mu.Lock()
	defer a.mu.Unlock()
	was := a.active[key.Name]
	switch {
	case current == nil || current.deleting:
		delete(a.active, key.Name)
		a.queueWaiting() // another resource may come into its place
		a.releaseAll()
		a.dirty()
		a.cacheSoon()
		return
	case current.err != nil:
		a.log.Warn("cannot read a rendered Secret, going on with its last readable form", "secret", key.Name, "error", current.err)
		return
	}
	next, err := newSelecting(current.rendered, was)
	if err != nil {
		a.log.Warn("cannot use a rendered Secret, going on with its last usable form", "secret", key.Name, "error", err)
		return
	}
	a.active[key.Name] = next
	a.releaseAll()
	a.cacheSoon()
	if was != nil && was.Target.Name() == next.Target.Name() && was.selection == next.selection && was.Kubelet == next.Kubelet {
		// A rotation: the coordinator brings it to every Secret that is there.
		if was.Rescue || next.Rescue {
			a.dirty()
		}
		return
	}
	a.queueWaiting()
	a.dirty()
}

// newSelecting compiles a rendered Secret, whose selectors may be those that it had before.
func newSelecting(rendered impsync.Rendered, was *selecting) (*selecting, error) {
	s := &selecting{Rendered: rendered}
	var err error
	if was != nil && was.SameSelectors(rendered) {
		s.selection = was.selection
	} else if s.selection, _, err = impsync.CompileSelection(rendered.Namespaces, rendered.Pods); err != nil {
		return nil, err
	}
	if rendered.Rescue || rendered.Kubelet != "" {
		s.credentials, err = rendered.Target.Credentials()
	}
	if rendered.Kubelet != "" {
		s.entries = s.cacheEntries()
	}
	return s, err
}

// namespaceMirror watches one namespace by its name. It does not log: where these watches
// fail, that of the Pods does too, and says so once.
func (a *Agent) namespaceMirror(ctx context.Context, name string, ns *namespace) *impsync.Mirror[namespaceMeta] {
	return impsync.NewMirror(impsync.MirrorConfig[namespaceMeta]{
		Name: "namespace " + name, Example: &metav1.PartialObjectMetadata{}, Log: slog.New(slog.DiscardHandler),
		ListWatch: impsync.MetadataListWatch(a.metadata, impsync.NamespaceResource, metav1.ObjectNameField+"="+name),
		Convert:   func(o runtime.Object) namespaceMeta { return *namespaceMetaOf(o.(*metav1.PartialObjectMetadata)) },
		OnChange: func(_ types.NamespacedName, _, current *namespaceMeta) {
			if current == nil {
				current = &namespaceMeta{terminating: true}
			}
			a.namespaceRead(ctx, name, ns, current)
		},
	})
}

func namespaceMetaOf(m *metav1.PartialObjectMetadata) *namespaceMeta {
	return &namespaceMeta{labels: m.Labels, annotations: m.Annotations, terminating: m.DeletionTimestamp != nil}
}

// namespaceRead records the metadata of a namespace that the watch brought which ctx ends.
func (a *Agent) namespaceRead(ctx context.Context, name string, ns *namespace, current *namespaceMeta) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if ctx.Err() != nil {
		return // nobody would tell of the next change
	}
	if ns.known != nil && ns.known.equal(current) {
		return
	}
	awaited := ns.known != nil || ns.failed
	ns.known = current
	if awaited && ns.waiting > 0 {
		a.queue.Add(name)
	}
	a.cacheSoon()
}

// next serves one namespace of the queue; false once ctx has ended. What is begun goes on
// under work, which outlives ctx a little.
func (a *Agent) next(ctx, work context.Context) bool {
	name, shutdown := a.queue.Get()
	if shutdown {
		return false
	}
	defer a.queue.Done(name)
	if ctx.Err() != nil {
		return false // a queue that is shut down hands out what is still in it
	}
	err := a.serve(work, name)
	switch {
	case err == nil:
		a.queue.Forget(name)
		a.refused.Forget(name)
		return true
	case work.Err() != nil:
		return true
	}
	class := impsync.ClassifyError(err)
	switch class {
	case impsync.ClassGone:
		a.queue.Forget(name)
		a.refused.Forget(name)
	case impsync.ClassWait:
		a.queue.Forget(name)
		a.queue.AddAfter(name, a.refused.When(name))
	case impsync.ClassTerminal:
		a.queue.Forget(name)
		a.queue.AddAfter(name, impsync.RecheckInterval)
	default:
		if delay, _ := apierrors.SuggestsClientDelay(err); delay > 0 { // some errors suggest one of zero
			a.queue.AddAfter(name, time.Duration(delay)*time.Second)
			defer impsync.Pause(ctx, impsync.ThrottlePause)
		} else {
			a.queue.AddRateLimited(name)
		}
	}
	// One line for what is refused, and for what goes on failing: what passes fails for
	// every namespace at once, and the watches tell of it.
	level := slog.LevelDebug
	if class == impsync.ClassTerminal || class == impsync.ClassWait && a.refused.NumRequeues(name) == 1 || a.queue.NumRequeues(name) == failuresToTell {
		level = slog.LevelWarn
	}
	a.log.Log(work, level, "cannot give a namespace its Secret", "namespace", name, "class", class.String(), "error", impsync.Explain(err))
	return true
}

// serve makes sure that the Pods of a namespace that wait here find the Secrets that
// select it, and that the node cache can tell what it is to hold for it.
func (a *Agent) serve(ctx context.Context, name string) error {
	if a.config.Excluded.Matches(name) {
		return nil
	}
	err := a.serveWaiting(ctx, name)
	a.mu.Lock()
	wants := a.cacheWants(name, a.namespaces[name], a.cacheNeedsMetadata())
	a.mu.Unlock()
	if !wants {
		return err
	}
	if _, readErr := a.readNamespace(ctx, name); readErr != nil {
		return errors.Join(err, readErr)
	}
	a.cacheSoon()
	return err
}

func (a *Agent) serveWaiting(ctx context.Context, name string) error {
	pods, oldest := a.podsOf(name)
	if oldest.IsZero() {
		return nil
	}
	meta := a.knownNamespace(name)
	wanted, decided := a.wanted(name, meta, pods)
	if !decided {
		var err error
		if meta, err = a.readNamespace(ctx, name); err != nil {
			return err
		}
		wanted, _ = a.wanted(name, meta, pods)
	}
	if meta != nil && meta.terminating {
		return nil
	}
	var errs []error
	for _, target := range wanted {
		created, err := a.ensure(ctx, name, target)
		errs = append(errs, err)
		if created {
			a.fastPath.Observe(time.Since(oldest).Seconds())
		}
	}
	return errors.Join(errs...)
}

// podsOf returns the Pods of a namespace, and since when the longest waiting one is known;
// zero where none waits.
func (a *Agent) podsOf(namespace string) (pods []pod, oldest time.Time) {
	var waiting []types.NamespacedName
	a.pods.Range(func(key types.NamespacedName, p pod) bool {
		if key.Namespace == namespace {
			pods = append(pods, p)
			if p.waiting {
				waiting = append(waiting, key)
			}
		}
		return true
	})
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, key := range waiting {
		if seen, ok := a.seen[key]; ok && (oldest.IsZero() || seen.Before(oldest)) {
			oldest = seen
		}
	}
	return pods, oldest
}

// knownNamespace returns what is known of a namespace, nil where that is nothing.
func (a *Agent) knownNamespace(name string) *namespaceMeta {
	a.mu.Lock()
	defer a.mu.Unlock()
	if ns := a.namespaces[name]; ns != nil {
		return ns.known
	}
	return nil
}

// readNamespace starts the watch of the namespace, where there is none, and returns what it
// knows. Until it has brought something, that is asked for: a watch may take a while to start.
func (a *Agent) readNamespace(ctx context.Context, name string) (*namespaceMeta, error) {
	a.mu.Lock()
	ns := a.namespaces[name]
	if ns == nil {
		a.mu.Unlock()
		return &namespaceMeta{terminating: true}, nil // no Pod of it waits any more
	}
	if ns.stop == nil {
		ns.stop = a.watchNamespace(name, ns)
	}
	known := ns.known
	a.mu.Unlock()
	if known != nil {
		return known, nil
	}
	ctx, cancel := context.WithTimeout(ctx, impsync.CallTimeout)
	defer cancel()
	m, err := a.metadata.Resource(impsync.NamespaceResource).Get(ctx, name, metav1.GetOptions{})
	a.mu.Lock()
	defer a.mu.Unlock()
	if ns.failed = err != nil && ns.known == nil; ns.failed {
		return nil, fmt.Errorf("read namespace %s: %w", name, err)
	}
	if ns.stop == nil {
		return namespaceMetaOf(m), nil // it was released meanwhile: nobody would tell of the next change
	}
	// The watch may have been faster, and knows as much or more.
	if ns.known == nil {
		ns.known = namespaceMetaOf(m)
	}
	return ns.known, nil
}

// wanted returns the targets that the namespace should have: for each name, the one of the
// oldest resource that selects the namespace. Where meta is nil, it goes by names and Pods
// alone, and decided tells whether labels and annotations could not decide otherwise.
func (a *Agent) wanted(name string, meta *namespaceMeta, pods []pod) (winners map[string]*selecting, decided bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	winners = map[string]*selecting{}
	wins := func(candidate *selecting) bool {
		winner := winners[candidate.Target.Name()]
		return winner == nil || candidate.Resource.Compare(winner.Resource) < 0
	}
	var open []*selecting
	for _, candidate := range a.active {
		switch {
		case candidate.selects(name, meta, pods):
			if wins(candidate) {
				winners[candidate.Target.Name()] = candidate
			}
		case meta == nil && candidate.selection.HasMetadataRules():
			open = append(open, candidate)
		}
	}
	return winners, !slices.ContainsFunc(open, wins)
}

// selects reports whether the resource selects the namespace, where meta is nil by its name
// or its Pods.
func (s *selecting) selects(name string, meta *namespaceMeta, pods []pod) bool {
	if s.selection.SelectsByName(name) || meta != nil && s.selection.SelectsByRule(name, meta.labels, meta.annotations) {
		return true
	}
	for _, p := range pods {
		if s.selection.MatchesPod(p.labels, p.annotations) {
			return true
		}
	}
	return false
}

// ensure creates the Secret where nothing is. Whatever is there is left as it is: only the
// coordinator changes Secrets. It reports whether it created one.
func (a *Agent) ensure(ctx context.Context, namespace string, s *selecting) (created bool, err error) {
	name := s.Target.Name()
	m, err := a.secrets.Peek(ctx, namespace, name)
	if apierrors.IsNotFound(err) {
		m, err = a.secrets.Create(ctx, namespace, s.Target)
		a.config.Metrics.SecretWrite(duty, "create", err)
		if err == nil {
			a.log.Debug("created Secret", "namespace", namespace, "secret", name, "revision", s.Target.Revision().String())
			return true, nil
		}
		if !apierrors.IsNotFound(err) {
			// Refused, perhaps since it is there by now: then all is well.
			if now, getErr := a.secrets.Get(ctx, namespace, name); getErr == nil {
				m, err = now, nil
			}
		}
	}
	if err != nil {
		return false, fmt.Errorf("target Secret %s/%s: %w", namespace, name, err)
	}
	if impsync.ExistingOf(m).Ownership == impsync.Foreign {
		a.log.Warn("a foreign Secret has the name of a pull Secret and is left alone", "namespace", namespace, "secret", name)
	}
	return false, nil
}
