package cluster

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/singleflight"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// targetKey is one target Secret, whether it is there or not.
type targetKey struct{ namespace, name string }

func (k targetKey) String() string { return k.namespace + "/" + k.name }

// term is one term of leadership: everything that a leader knows. A new term starts from
// nothing but what the API server holds.
type term struct {
	*Coordinator
	recorder record.EventRecorder

	resources  *impsync.Mirror[*v1alpha1.ImagePullSecret]
	namespaces *impsync.Mirror[namespaceMeta]
	nodes      *impsync.Mirror[struct{}]
	reports    *impsync.Mirror[reportObject]
	rendered   *impsync.Mirror[renderedSecret]
	// accounts is nil where no resource has had anything attached to ServiceAccounts.
	accounts *impsync.Mirror[account]

	resourceQueue workqueue.TypedRateLimitingInterface[types.UID]
	targetQueue   workqueue.TypedRateLimitingInterface[targetKey]
	statusQueue   workqueue.TypedRateLimitingInterface[types.UID]
	reportQueue   workqueue.TypedRateLimitingInterface[string]
	accountQueue  workqueue.TypedRateLimitingInterface[string] // namespaces
	rescueQueue   workqueue.TypedRateLimitingInterface[stuckPod]

	// background runs a mirror that is started along the way.
	background func(func(context.Context)) context.CancelFunc
	// stop ends the term.
	stop func(error)
	// reads shares live reads between those who need the same one.
	reads         singleflight.Group
	readResources *sharedRead[[]metav1.PartialObjectMetadata]
	readReports   *sharedRead[map[string][]types.UID]

	mu sync.Mutex
	// started: the first lists are in, and changes are worth a look.
	started bool
	// byUID are all resources, gone the ones that were deleted in this term, or found to be
	// gone: true where their Secrets stay (orphaned).
	byUID map[types.UID]*v1alpha1.ImagePullSecret
	gone  map[types.UID]bool
	// claims are the resources in force, and byTarget the same by target name.
	claims   map[types.UID]*claim
	byTarget map[string]map[types.UID]*claim
	// targets mirror the Secrets of each name that any resource used in this term.
	targets map[string]*impsync.Mirror[impsync.Existing]
	sources map[types.NamespacedName]*source
	demand  demand
	// formats are the versions of the rendered form that each node's agent reads, and
	// readers is how many agents read each version.
	formats map[string][]int
	readers map[int]int
	// undeletable are Secrets that are not wanted and could not be deleted.
	undeletable map[targetKey]undeletable
	// grants are the IDs of the grants that each resource uses.
	grants map[types.UID]map[string]struct{}
	// accountsIn are the ServiceAccounts of each namespace, undone is how often somebody took out what was attached to one,
	// and refused why one could not be changed.
	accountsIn map[string]map[string]struct{}
	undone     map[types.NamespacedName]repairs
	refused    map[types.NamespacedName]string
	// writing are those with a write of ours under way, whose event may come before the answer.
	writing map[types.NamespacedName]bool
	// stuck are the Pods of each node that cannot pull, as its report says.
	stuck map[string][]impsync.StuckPod
	// counted are the nodes; nil where they are to be counted.
	counted *nodeCount
	// withoutAgent is the number of nodes without a report.
	withoutAgent int
	// nodeGone is when a node was deleted, and reportDropped says that its report was, too.
	nodeGone      map[string]time.Time
	reportDropped map[string]bool
}

// namespaceMeta is what is kept of a Namespace.
type namespaceMeta struct {
	labels, annotations map[string]string
	terminating         bool
}

func (m namespaceMeta) equal(other namespaceMeta) bool {
	return m.terminating == other.terminating && maps.Equal(m.labels, other.labels) && maps.Equal(m.annotations, other.annotations)
}

// reportObject is what is kept of a node report's ConfigMap.
type reportObject struct {
	// demand is sorted, and holds nothing twice.
	demand          []demandKey
	stuck           []impsync.StuckPod
	formats         []int                  // as in impsync.Report
	kubelet         *impsync.KubeletReport // as there
	err             error
	uid             types.UID
	resourceVersion string
}

// renderedSecret is what is kept of a rendered Secret.
type renderedSecret struct {
	rendered        impsync.Rendered
	err             error
	uid             types.UID
	resourceVersion string
}

func newTerm(c *Coordinator, recorder record.EventRecorder) *term {
	t := &term{
		Coordinator:   c,
		recorder:      recorder,
		readResources: newSharedRead[[]metav1.PartialObjectMetadata](),
		readReports:   newSharedRead[map[string][]types.UID](),
		byUID:         map[types.UID]*v1alpha1.ImagePullSecret{},
		gone:          map[types.UID]bool{},
		claims:        map[types.UID]*claim{},
		byTarget:      map[string]map[types.UID]*claim{},
		targets:       map[string]*impsync.Mirror[impsync.Existing]{},
		sources:       map[types.NamespacedName]*source{},
		undeletable:   map[targetKey]undeletable{},
		accountsIn:    map[string]map[string]struct{}{},
		undone:        map[types.NamespacedName]repairs{},
		refused:       map[types.NamespacedName]string{},
		writing:       map[types.NamespacedName]bool{},
		stuck:         map[string][]impsync.StuckPod{},
		nodeGone:      map[string]time.Time{},
		reportDropped: map[string]bool{},
		formats:       map[string][]int{},
		readers:       map[int]int{},
		grants:        map[types.UID]map[string]struct{}{},
		demand:        demand{byNode: map[string][]demandKey{}, states: map[demandKey]*demandState{}},
	}
	t.resources = impsync.NewMirror(impsync.MirrorConfig[*v1alpha1.ImagePullSecret]{
		Name: "ImagePullSecrets", Example: &v1alpha1.ImagePullSecret{}, Log: c.log,
		ListWatch: imagesListWatch(c),
		Convert: func(o runtime.Object) *v1alpha1.ImagePullSecret {
			r := o.(*v1alpha1.ImagePullSecret)
			r.ManagedFields = nil
			return r
		},
		OnChange: t.resourceChanged,
	})
	t.namespaces = impsync.NewMirror(impsync.MirrorConfig[namespaceMeta]{
		Name: "namespaces", Example: &metav1.PartialObjectMetadata{}, Log: c.log,
		ListWatch: impsync.MetadataListWatch(c.metadata, impsync.NamespaceResource, ""),
		Convert: func(o runtime.Object) namespaceMeta {
			m := o.(*metav1.PartialObjectMetadata)
			return namespaceMeta{labels: m.Labels, annotations: m.Annotations, terminating: m.DeletionTimestamp != nil}
		},
		OnChange: t.namespaceChanged,
	})
	t.nodes = impsync.NewMirror(impsync.MirrorConfig[struct{}]{
		Name: "nodes", Example: &metav1.PartialObjectMetadata{}, Log: c.log,
		ListWatch: impsync.MetadataListWatch(c.metadata, impsync.NodeResource, ""),
		Convert:   func(runtime.Object) struct{} { return struct{}{} },
		OnChange:  t.nodeChanged,
	})
	t.reports = impsync.NewMirror(impsync.MirrorConfig[reportObject]{
		Name: "node reports", Example: &corev1.ConfigMap{}, Log: c.log,
		ListWatch: impsync.TypedListWatch(c.core.ConfigMaps(c.config.Namespace).List, c.core.ConfigMaps(c.config.Namespace).Watch,
			metav1.ListOptions{LabelSelector: impsync.LabelComponent + "=" + impsync.ComponentReport}),
		Convert:  func(o runtime.Object) reportObject { return reportOf(o.(*corev1.ConfigMap)) },
		OnChange: t.reportChanged,
	})
	t.rendered = impsync.NewMirror(impsync.MirrorConfig[renderedSecret]{
		Name: "rendered Secrets", Example: &corev1.Secret{}, Log: c.log,
		ListWatch: impsync.TypedListWatch(c.core.Secrets(c.config.RenderedNamespace).List, c.core.Secrets(c.config.RenderedNamespace).Watch, metav1.ListOptions{}),
		Convert:   func(o runtime.Object) renderedSecret { return c.renderedOf(o.(*corev1.Secret)) },
		OnChange:  t.renderedChanged,
		Version:   func(r renderedSecret) string { return r.resourceVersion },
	})
	t.resourceQueue = newQueue[types.UID]("resources")
	t.targetQueue = newQueue[targetKey]("targets")
	t.statusQueue = newQueue[types.UID]("status")
	t.reportQueue = newQueue[string]("reports")
	t.accountQueue = newQueue[string]("serviceaccounts")
	t.rescueQueue = newQueue[stuckPod]("rescue")
	return t
}

func newQueue[K comparable](name string) workqueue.TypedRateLimitingInterface[K] {
	return workqueue.NewTypedRateLimitingQueueWithConfig(
		workqueue.NewTypedItemExponentialFailureRateLimiter[K](100*time.Millisecond, time.Minute),
		workqueue.TypedRateLimitingQueueConfig[K]{Name: "cluster-" + name})
}

func reportOf(c *corev1.ConfigMap) reportObject {
	report, err := impsync.DecodeReport(c.Data)
	if err == nil && impsync.ReportName(report.Node) != c.Name {
		err = errors.New("node report: it names another node than its name does")
	}
	r := reportObject{formats: report.FormatVersions, kubelet: report.Kubelet, stuck: report.Stuck[:min(len(report.Stuck), stuckMax)], err: err, uid: c.UID, resourceVersion: c.ResourceVersion}
	for namespace, uids := range report.Demand {
		for _, uid := range uids {
			r.demand = append(r.demand, demandKey{namespace, uid})
		}
	}
	slices.SortFunc(r.demand, demandKey.compare)
	r.demand = slices.Compact(r.demand)
	return r
}

func (c *Coordinator) renderedOf(s *corev1.Secret) renderedSecret {
	rendered, err := impsync.DecodeRendered(s, c.config.FormatVersions)
	return renderedSecret{rendered: rendered, err: err, uid: s.UID, resourceVersion: s.ResourceVersion}
}

func imagesListWatch(c *Coordinator) cache.ListerWatcher {
	return impsync.TypedListWatch(
		func(ctx context.Context, options metav1.ListOptions) (*v1alpha1.ImagePullSecretList, error) {
			return impsync.ListImages(ctx, c.images, options)
		},
		func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			options.Watch = true
			return c.images.Get().Resource(v1alpha1.Resource.Resource).VersionedParams(&options, metav1.ParameterCodec).Watch(ctx)
		},
		metav1.ListOptions{})
}

// run leads until ctx ends or the term is over; then it finishes what is in flight.
func (t *term) run(ctx context.Context) error {
	t.metrics.reset()
	defer t.metrics.reset()
	t.leads.Store(t)
	defer func() {
		t.leads.Store(nil)
		t.releaseAllTokens()
	}()
	ctx, cancel := context.WithCancelCause(ctx)
	t.stop = func(err error) { cancel(err) }
	work, finish := impsync.WithGrace(ctx)
	defer finish()

	var extra sync.WaitGroup
	defer func() {
		cancel(nil)
		extra.Wait()
	}()
	t.background = func(f func(context.Context)) context.CancelFunc {
		ctx, end := context.WithCancel(ctx)
		extra.Go(func() {
			if err := impsync.RunTasks(ctx, func(ctx context.Context) error { f(ctx); return nil }); err != nil {
				cancel(err)
			}
		})
		return end
	}

	mirror := func(run func(context.Context)) func(context.Context) error {
		return func(ctx context.Context) error { run(ctx); return nil }
	}
	err := impsync.RunTasks(ctx,
		mirror(t.resources.Run), mirror(t.namespaces.Run), mirror(t.nodes.Run), mirror(t.reports.Run), mirror(t.rendered.Run),
		func(ctx context.Context) error {
			<-ctx.Done()
			t.resourceQueue.ShutDown()
			t.targetQueue.ShutDown()
			t.statusQueue.ShutDown()
			t.reportQueue.ShutDown()
			t.accountQueue.ShutDown()
			t.rescueQueue.ShutDown()
			return nil
		},
		func(ctx context.Context) error {
			if !t.begin(ctx) {
				return nil
			}
			t.synced.Store(true)
			serve := slices.Concat(
				workersOf(work, t, 4, "ImagePullSecret", t.resourceQueue, t.reconcileResource),
				workersOf(work, t, writers, "target Secret", t.targetQueue, t.reconcileTarget),
				workersOf(work, t, 2, "status", t.statusQueue, t.reconcileStatus),
				workersOf(work, t, 1, "node report", t.reportQueue, t.dropReport),
				workersOf(work, t, accountWriters, "ServiceAccounts of a namespace", t.accountQueue, t.reconcileAccounts),
				workersOf(work, t, 1, "stuck Pod", t.rescueQueue, t.rescue),
			)
			return impsync.RunTasks(ctx, append(serve, mirror(t.findAttached))...)
		})
	if cause := context.Cause(ctx); err == nil && !errors.Is(cause, context.Canceled) {
		return cause // superseded, or a panic beside the tasks
	}
	return err
}

// begin waits for the first lists and puts everything in force that was rendered before,
// so that nothing is judged by half of what is known. It reports false where ctx ended.
func (t *term) begin(ctx context.Context) bool {
	names := slices.Clone(t.config.TargetSecretNames)
	wait := []<-chan struct{}{t.resources.Synced(), t.namespaces.Synced(), t.nodes.Synced(), t.reports.Synced(), t.rendered.Synced()}
	for _, synced := range wait {
		select {
		case <-synced:
		case <-ctx.Done():
			return false
		}
	}
	if allowed(names, Any) {
		var err error
		if names, err = t.namesInUse(ctx); err != nil {
			t.log.Warn("cannot find out which names our Secrets have; those of names that no resource uses any more stay", "error", impsync.Explain(err))
		}
	}
	t.mu.Lock()
	for _, name := range names {
		t.mirrorTargets(name)
	}
	for _, r := range t.byUID {
		if name := r.Spec.Target.Secret.Name; name != "" && t.targetNameAllowed(name) == nil {
			t.mirrorTargets(name)
		}
	}
	t.mu.Unlock()
	var stale []types.UID
	var reported []string
	renderedOf := map[types.UID]impsync.Rendered{} // zero where it cannot be read
	t.rendered.Range(func(key types.NamespacedName, r renderedSecret) bool {
		renderedOf[impsync.UIDOfRendered(key.Name)] = r.rendered
		return true
	})
	t.reports.Range(func(key types.NamespacedName, _ reportObject) bool {
		reported = append(reported, nodeOfReport(key.Name))
		return true
	})

	t.mu.Lock()
	for uid, r := range t.byUID {
		if r.DeletionTimestamp != nil {
			continue
		}
		c := newClaim(r, renderedOf[uid])
		t.putClaim(c)
		t.expectOutcomes(c)
		t.setAccounts(c, r)
	}
	for uid := range renderedOf {
		if _, ok := t.byUID[uid]; !ok {
			stale = append(stale, uid)
		}
	}
	t.started = true
	uids := slices.Collect(maps.Keys(t.byUID))
	t.enqueueAllTargets()
	t.mu.Unlock()
	for _, uid := range slices.Concat(uids, stale) {
		t.resourceQueue.Add(uid)
	}
	for _, node := range reported {
		t.checkReport(node)
	}
	t.updateNodesWithoutAgent()
	return true
}

// namesInUse lists the names of all Secrets with our label. Only with "*" as the allowed
// names may the coordinator list across names.
func (t *term) namesInUse(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, 6*impsync.CallTimeout)
	defer cancel()
	list, err := t.metadata.Resource(impsync.SecretResource).List(ctx, metav1.ListOptions{LabelSelector: impsync.LabelOwnerUID})
	if err != nil {
		return nil, err
	}
	names := map[string]struct{}{}
	for i := range list.Items {
		names[list.Items[i].Name] = struct{}{}
	}
	return slices.Collect(maps.Keys(names)), nil
}

// workersOf returns n tasks that work a queue off until their context ends; what is begun
// goes on under work, which outlives it a little. Errors stop here: each is logged once,
// and its class decides when the item comes back.
func workersOf[K comparable](work context.Context, t *term, n int, what string, queue workqueue.TypedRateLimitingInterface[K], reconcile func(context.Context, K) error) []func(context.Context) error {
	refused := workqueue.NewTypedItemExponentialFailureRateLimiter[K](impsync.RecheckSoonest, impsync.RecheckInterval)
	worker := func(ctx context.Context) error {
		for {
			item, shutdown := queue.Get()
			if shutdown {
				return nil
			}
			select {
			case <-ctx.Done(): // a queue that is shut down hands out what is still in it
				queue.Done(item)
				return nil
			default:
			}
			err := reconcile(work, item)
			switch {
			case err == nil:
				queue.Forget(item)
				refused.Forget(item)
			case errors.Is(err, errSuperseded):
				t.stop(errSuperseded)
			case work.Err() == nil:
				pause := comeBack(queue, refused, item, err)
				t.logFailure(work, what, fmt.Sprint(item), err, refused.NumRequeues(item) > 1)
				impsync.Pause(ctx, pause)
			}
			queue.Done(item)
		}
	}
	return slices.Repeat([]func(context.Context) error{worker}, n)
}

// comeBack puts an item that failed back into its queue, for when the error's class says.
// What was refused comes back when refused says. Where the server asks for a delay, it
// returns for how long the worker is to pause, too: other items are no better received.
func comeBack[K comparable](queue workqueue.TypedRateLimitingInterface[K], refused workqueue.TypedRateLimiter[K], item K, err error) (pause time.Duration) {
	delay, _ := apierrors.SuggestsClientDelay(err)
	switch class := impsync.ClassifyError(err); {
	case class == impsync.ClassGone:
		queue.Forget(item)
		refused.Forget(item)
	case class == impsync.ClassWait:
		queue.Forget(item)
		queue.AddAfter(item, refused.When(item))
	case class == impsync.ClassTerminal:
		queue.Forget(item)
		queue.AddAfter(item, impsync.RecheckInterval)
	case delay > 0: // some errors suggest one of zero
		queue.AddAfter(item, time.Duration(delay)*time.Second)
		return impsync.ThrottlePause
	default:
		queue.AddRateLimited(item)
	}
	return 0
}

func (t *term) logFailure(ctx context.Context, what, item string, err error, again bool) {
	// What passes is many lines where the API server is away, and the watches tell of that
	// in one. The status tells of what does not pass.
	level := slog.LevelDebug
	class := impsync.ClassifyError(err)
	if class == impsync.ClassWait && !again || class == impsync.ClassTerminal {
		level = slog.LevelWarn
	}
	t.log.Log(ctx, level, "failed, will look at it again", "what", what, "item", item, "class", class.String(), "error", impsync.Explain(err))
}
