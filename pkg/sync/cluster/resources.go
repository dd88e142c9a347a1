package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/util/workqueue"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// claim is a resource in force: what it selects, and the target that the selected
// namespaces get. The term's lock guards it.
type claim struct {
	ref impsync.ResourceRef
	// rendered is what the rendered Secret says; its target is zero before there is one.
	rendered  impsync.Rendered
	selection *impsync.Selection
	// accounts are the ServiceAccounts that name the Secret, nil for none; they are compiled from accountsSpec, without what
	// is wrong in it.
	accounts        *impsync.AccountSelection
	accountsSpec    *v1alpha1.ServiceAccountSelector
	accountsSkipped []error
	// early is what the resource selects as long as there is nothing to deliver, as no source has given anything yet.
	early *impsync.Selection
	// expectations are the target as applied with each set of owners.
	expectations map[string]*impsync.Expectation
	// outcomes are the namespaces that the claim selects, or that keep its Secret.
	outcomes map[string]outcome
	// repairs are the Secrets that others changed or deleted after they were delivered.
	repairs map[string]repairs
	// withdrawn: the resource asks for nothing, and none of its Secrets is wanted.
	withdrawn bool
	// state is nil until it was read.
	state *state
	// minCounter is a counter seen on a target; ours must be higher.
	minCounter uint64

	// settled is the generation of the resource that the selection in force is of.
	settled int64

	// What the status tells beside the outcomes.
	generation int64
	problem    error // of the resource itself
	failure    error // passing, of the API server
	skipped    []error
	sources    map[string]string
	// identityChanged: the coordinator is not who it was when it asked ECR for a token.
	identityChanged bool
	// unread: the sources have not all been read yet in this term.
	unread bool
	// statusWritten is when the status was last written.
	statusWritten time.Time
	// told is the cause of the last Event about each condition.
	told map[string]string
	// reported is the revision that was Ready when the status was last written.
	reported uint64
}

// newClaim puts a resource in force as it was rendered, or selects nothing where it never
// was.
func newClaim(r *v1alpha1.ImagePullSecret, rendered impsync.Rendered) *claim {
	c := &claim{ref: impsync.RefOf(r), outcomes: map[string]outcome{}, repairs: map[string]repairs{}, unread: true}
	if !rendered.Target.IsZero() {
		if selection, _, err := impsync.CompileSelection(rendered.Namespaces, rendered.Pods); err == nil {
			c.setRendered(rendered, selection)
		}
	}
	return c
}

func (c *claim) setRendered(rendered impsync.Rendered, selection *impsync.Selection) {
	c.rendered, c.selection = rendered, selection
	c.withdrawn = c.withdrawn && rendered.Target.IsZero()
	c.expectations = map[string]*impsync.Expectation{}
	clear(c.repairs)
}

// undecided reports whether it is not known yet in this term what the resource delivers:
// its rendered Secret is gone, or cannot be read.
func (c *claim) undecided() bool {
	return c.rendered.Target.IsZero() && !c.withdrawn && (c.unread || c.failure != nil)
}

// putClaim puts a claim in force. The caller holds the lock.
func (t *term) putClaim(c *claim) {
	t.claims[c.ref.UID] = c
	for _, claims := range t.byTarget {
		delete(claims, c.ref.UID)
	}
	name := c.rendered.Target.Name()
	if name == "" {
		return
	}
	if t.byTarget[name] == nil {
		t.byTarget[name] = map[types.UID]*claim{}
	}
	t.byTarget[name][c.ref.UID] = c
	t.mirrorTargets(name)
}

// reselect has every namespace looked at for a claim that selects anew. The caller holds the
// lock.
func (t *term) reselect(c *claim) {
	t.expectOutcomes(c)
	if name := c.rendered.Target.Name(); name != "" {
		t.enqueueNamespaces(name)
	}
}

// resourceChanged is told of every event of an ImagePullSecret.
func (t *term) resourceChanged(_ types.NamespacedName, old, current **v1alpha1.ImagePullSecret) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if old != nil && (current == nil || (*current).UID != (*old).UID) {
		uid := (*old).UID
		// The last state before it went says whether its Secrets were to stay.
		t.gone[uid] = orphans(*old)
		delete(t.byUID, uid)
		t.resourceQueue.Add(uid)
	}
	if current == nil {
		return
	}
	r := *current
	t.byUID[r.UID] = r
	if r.DeletionTimestamp != nil && slices.Contains(r.Finalizers, metav1.FinalizerDeleteDependents) {
		t.gone[r.UID] = false // it waits for its Secrets to go first
	}
	statusOnly := old != nil && (*old).UID == r.UID && (*old).Generation == r.Generation &&
		(*old).DeletionTimestamp.Equal(r.DeletionTimestamp) && slices.Equal((*old).Finalizers, r.Finalizers)
	if statusOnly {
		t.statusDirty(r.UID) // our own write, or somebody's who should not have
		return
	}
	t.resourceQueue.Add(r.UID)
}

// orphans reports whether the resource's deletion leaves its Secrets where they are.
func orphans(r *v1alpha1.ImagePullSecret) bool {
	return slices.Contains(r.Finalizers, metav1.FinalizerOrphanDependents)
}

func (t *term) renderedChanged(key types.NamespacedName, old, current *renderedSecret) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.started {
		return
	}
	for _, r := range []*renderedSecret{old, current} {
		if r != nil && r.err == nil {
			t.resourceQueue.Add(r.rendered.Resource.UID)
		}
	}
	for uid := range t.claims {
		if impsync.RenderedName(uid) == key.Name {
			t.resourceQueue.Add(uid)
		}
	}
}

// reconcileResource resolves, merges and renders one resource, or ends it.
func (t *term) reconcileResource(ctx context.Context, uid types.UID) error {
	t.mu.Lock()
	r := t.byUID[uid]
	_, seenGoing := t.gone[uid]
	if r == nil || r.DeletionTimestamp != nil {
		t.mu.Unlock()
		if r == nil && !seenGoing {
			// Nobody has told of its end: perhaps it is too new for our watch, which will
			// bring it.
			if there, err := t.isThere(ctx, uid); there || err != nil {
				return err
			}
			// What still refers to it was not orphaned.
			t.change(func() { t.gone[uid] = false })
		}
		return t.retire(ctx, uid)
	}
	c := t.claims[uid]
	if c == nil {
		published, _ := t.published(uid)
		c = newClaim(r, published)
		t.putClaim(c)
		t.setAccounts(c, r)
		t.reselect(c) // as it was rendered before
		t.enqueueTargetsOf(c)
	}
	known := c.state
	t.mu.Unlock()
	defer t.statusDirty(uid)

	if known == nil {
		read, err := t.readState(ctx, uid)
		if err != nil {
			t.change(func() { c.failure, c.unread = err, false })
			return err
		}
		known = &read
	}
	credentials := t.readCredentials(r)
	tokens := t.useTokens(uid, credentials, known.tokens)
	now := t.awsNow()
	resolved := resolve(credentials, known, now)
	resolved.tokens = tokens
	lookAgain(t.resourceQueue, uid, resolved.until, now)
	if resolved.pending {
		t.change(func() { c.state = known })
		return nil // the source's watch brings it back
	}
	selection, skipped, problem := t.validate(r)
	var failure error
	if problem == nil {
		problem, failure = t.renderAndPublish(ctx, r, c, known, resolved, selection)
	}
	if problem != nil {
		var worse error
		if worse, failure = t.renewInForce(ctx, r, c, known, resolved); worse != nil {
			problem = fmt.Errorf("%w; and tokens of what was delivered before are not renewed: %w", problem, worse)
		}
	}
	class := impsync.ClassifyError(failure)
	if errors.Is(failure, errSuperseded) || errors.Is(failure, errLeaseStale) || errors.Is(failure, errStateGone) || class == impsync.ClassConflict || class == impsync.ClassGone {
		return failure // nothing to tell of: the next try, or the event of its end, settles it
	}
	// All at once, and only now: no status ever tells of half a change.
	t.change(func() {
		if failure == nil {
			c.settled = r.Generation // also where it has a problem: the last good one stays in force
		}
		if failure == nil && c.state == nil {
			c.state = known
		}
		undecided := c.undecided()
		solved := (c.problem != nil || c.failure != nil) && problem == nil && failure == nil
		c.generation, c.sources, c.skipped, c.unread = r.Generation, resolved.sources, skipped, false
		c.identityChanged = resolved.identityChanged
		c.problem, c.failure = problem, failure
		if problem == nil && failure == nil {
			t.setAccounts(c, r)
			if c.early = nil; c.rendered.Target.IsZero() && !c.withdrawn {
				c.early = selection
				t.enqueueAllAccounts()
			}
		}
		if undecided && !c.undecided() || solved {
			// It delivers nothing, and others may claim what it left; or what it holds may go.
			t.enqueueTargetsOf(c)
			t.enqueueAllAccounts()
		}
	})
	return failure
}

// renderAndPublish brings the resource's rendered Secret up to date. A problem is one of
// the resource itself; what was rendered before stays in force. A failure passes.
func (t *term) renderAndPublish(ctx context.Context, r *v1alpha1.ImagePullSecret, c *claim, known *state, resolved resolution, selection *impsync.Selection) (problem, failure error) {
	if r.Spec.Target.Secret.Name == "" {
		return nil, t.withdraw(ctx, c, r.Generation)
	}
	t.mu.Lock()
	current := c.rendered
	t.mu.Unlock()
	if current.Target.IsZero() && resolved.empty {
		return nil, nil
	}
	remembered := state{lastGood: resolved.lastGood, tokens: resolved.tokens}
	credentials := resolved.given
	if !current.Target.IsZero() && known.incomplete && resolved.incomplete {
		// What this source gave before is only in the rendered Secret, merged: keep that.
		remembered.incomplete = true
		if credentials, problem = t.hold(current, resolved.given); problem != nil {
			return problem, nil
		}
	}
	next := impsync.Rendered{
		Resource: impsync.RefOf(r), Namespaces: r.Spec.Target.Namespaces, Pods: r.Spec.Target.NamespacesWithPods,
		Rescue: r.Spec.Target.Rescue && t.config.AllowRescue, Kubelet: r.Spec.Target.KubeletScope(), Expiries: credentials.expiries,
	}
	return t.render(ctx, c, r.Generation, known, remembered, next, credentials.config, selection, func(counter uint64, config dockerconfig.Sensitive) (impsync.Target, error) {
		return impsync.NewTarget(next.Resource, r.Spec.Target.Secret, counter, config)
	})
}

// renewInForce renews the tokens in what is in force of a resource whose newest spec has a problem, and changes nothing else.
func (t *term) renewInForce(ctx context.Context, r *v1alpha1.ImagePullSecret, c *claim, known *state, resolved resolution) (problem, failure error) {
	t.mu.Lock()
	current, selection := c.rendered, c.selection
	t.mu.Unlock()
	if current.Target.IsZero() || len(current.Expiries)+len(resolved.renewed.expiries) == 0 {
		return nil, nil
	}
	credentials, err := t.hold(current, resolved.renewed)
	if err != nil {
		return err, nil
	}
	remembered := *known
	remembered.tokens = maps.Clone(known.tokens)
	for id, token := range resolved.tokens {
		if _, ok := remembered.tokens[id]; ok {
			remembered.tokens[id] = token
		}
	}
	next := current
	next.Resource, next.Expiries = impsync.RefOf(r), credentials.expiries
	return t.render(ctx, c, r.Generation, known, remembered, next, credentials.config, selection, current.Target.WithConfig)
}

// hold returns what was rendered before, as far as it has not expired, with the newest tokens for its registries and for those
// that it does not have. It is for where what a resource holds cannot be told from its sources alone.
func (t *term) hold(current impsync.Rendered, newest given) (given, error) {
	config, err := current.Target.Credentials()
	if err != nil {
		return given{}, fmt.Errorf("what was rendered before: %w", err)
	}
	has := config.Registries()
	newest = newest.only(func(registry string) bool {
		_, isToken := newest.expiries[registry]
		_, wasToken := current.Expiries[registry]
		return isToken && (wasToken || !slices.Contains(has, registry))
	})
	now := t.awsNow()
	held := given{config, current.Expiries}.unexpired(now).only(func(registry string) bool {
		_, ok := newest.expiries[registry]
		return !ok
	})
	lookAgain(t.resourceQueue, current.Resource.UID, held.end(), now)
	return merge(held, newest), nil
}

// lookAgain has something looked at when it is time, and until then every minute: timers stand still while a machine is
// suspended, tokens do not.
func lookAgain[T comparable](queue workqueue.TypedDelayingInterface[T], item T, until, now time.Time) {
	if !until.IsZero() {
		queue.AddAfter(item, min(until.Sub(now), time.Minute))
	}
}

// render publishes what a resource asks for from now on, under a counter that is higher than that of anything that it
// differs from. Of the state that is to be remembered the counter is missing, of the rendered form its target, which
// targetOf makes.
func (t *term) render(
	ctx context.Context, c *claim, generation int64, known *state, remembered state, next impsync.Rendered, config dockerconfig.Config, selection *impsync.Selection,
	targetOf func(counter uint64, config dockerconfig.Sensitive) (impsync.Target, error),
) (problem, failure error) {
	t.mu.Lock()
	current, minCounter := c.rendered, c.minCounter
	t.mu.Unlock()
	published, there := t.published(c.ref.UID)
	counter := current.Target.Revision().Counter
	outrun := max(published.Target.Revision().Counter, minCounter) > counter ||
		there && published.Target.Revision().Counter == counter && !published.Target.SameContent(current.Target)
	if outrun {
		// Somebody counted on: a leader after us, or one whose traces we have lost.
		if err := t.holdsLease(ctx); err != nil {
			return nil, err
		}
	}
	rendered, err := config.Render()
	if err != nil {
		return fmt.Errorf("the merged credentials: %w; list fewer registries", err), nil
	}
	next.FormatVersion = t.formatVersion(published.FormatVersion)
	if next.Target, err = targetOf(counter, rendered); err != nil {
		return err, nil
	}
	if !there || outrun || !next.Target.SameContent(current.Target) {
		before := counter
		counter = max(counter, known.counter, published.Target.Revision().Counter, minCounter, t.highestCounter(c.ref.UID))
		// What is published beyond ours may be just this: our own, whose answer was lost.
		ours := counter > before && counter == published.Target.Revision().Counter && next.Target.SameContent(published.Target)
		if !ours {
			counter++
		}
		if next.Target, err = targetOf(counter, rendered); err != nil {
			return err, nil
		}
	}
	remembered.counter = counter
	return t.publish(ctx, c, generation, known, remembered, next, selection)
}

// change changes what the lock guards.
func (t *term) change(change func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	change()
}

// validate returns the compiled selectors, or what is wrong with the spec as a whole.
func (t *term) validate(r *v1alpha1.ImagePullSecret) (*impsync.Selection, []error, error) {
	selection, skipped, err := impsync.CompileSelection(r.Spec.Target.Namespaces, r.Spec.Target.NamespacesWithPods)
	if err != nil {
		return nil, nil, err
	}
	name := r.Spec.Target.Secret.Name
	if name == "" {
		if !selection.HasRules() {
			return selection, skipped, nil // a resource without a spec asks for nothing
		}
		return nil, nil, errors.New("spec.target.secret.name is empty")
	}
	return selection, skipped, t.targetNameAllowed(name)
}

// published is what the rendered Secret of a resource holds.
func (t *term) published(uid types.UID) (impsync.Rendered, bool) {
	r, ok := t.rendered.Get(t.renderedKey(uid))
	return r.rendered, ok && r.err == nil
}

func (t *term) renderedKey(uid types.UID) types.NamespacedName {
	return types.NamespacedName{Namespace: t.config.RenderedNamespace, Name: impsync.RenderedName(uid)}
}

// highestCounter returns the highest counter of the resource on any target Secret.
func (t *term) highestCounter(uid types.UID) uint64 {
	t.mu.Lock()
	mirrors := slices.Collect(maps.Values(t.targets))
	t.mu.Unlock()
	var highest uint64
	for _, mirror := range mirrors {
		mirror.Range(func(_ types.NamespacedName, x impsync.Existing) bool {
			highest = max(highest, counterOf(x, uid))
			return true
		})
	}
	return highest
}

// publish writes state and rendered Secret where they differ, and puts the claim in force.
// The state goes first: its counter must never be behind that of a target.
func (t *term) publish(ctx context.Context, c *claim, generation int64, known *state, remembered state, next impsync.Rendered, selection *impsync.Selection) (problem, failure error) {
	data, err := impsync.EncodeRendered(next)
	if err != nil {
		return err, nil
	}
	remembered.uid, remembered.resourceVersion = known.uid, known.resourceVersion
	t.mu.Lock()
	before := c.rendered
	t.mu.Unlock()
	published, there := t.published(c.ref.UID)
	changed := !sameState(*known, remembered)
	if !before.Target.IsZero() && (changed && known.uid == "" || !there) {
		// It was there. The garbage collector deletes state and rendered Secret, too.
		if err := t.confirmAlive(ctx, c.ref); impsync.ClassifyError(err) == impsync.ClassGone {
			return nil, err
		} else if err != nil {
			return nil, passing("is the resource there", err)
		}
	}
	if changed {
		raw, err := encodeState(remembered)
		if err != nil {
			return err, nil
		}
		if remembered.uid, remembered.resourceVersion, err = t.writeState(ctx, c.ref, raw, *known); err != nil {
			t.change(func() { c.state = nil }) // whatever is there, it is read again
			if errors.Is(err, errStateGone) {
				again := *known // nothing is: what is known is written anew
				again.uid, again.resourceVersion = "", ""
				t.change(func() { c.state = &again })
			}
			return nil, err
		}
		t.change(func() { c.state = &remembered }) // also where the rendered Secret cannot be written
	}
	if !there || !sameRendered(published, next) {
		was, _ := t.rendered.Get(t.renderedKey(c.ref.UID)) // also one that cannot be read
		written, err := t.writeRendered(ctx, c.ref, data, was)
		if err != nil {
			return nil, err
		}
		t.rendered.Put(t.renderedKey(c.ref.UID), t.renderedOf(written))
	}

	t.mu.Lock()
	defer t.mu.Unlock()
	c.state, c.settled = &remembered, generation
	if t.claims[c.ref.UID] != c {
		return nil, nil // ended meanwhile
	}
	reselected := before.Target.IsZero() || before.Target.Name() != next.Target.Name() || !before.SameSelectors(next)
	if !reselected && before.Target.Revision() == next.Target.Revision() {
		c.rendered = next
		return nil, nil
	}
	if reselected {
		t.enqueueTargetsOf(c) // under its name until now
	}
	c.setRendered(next, selection)
	t.putClaim(c)
	if reselected {
		t.reselect(c)
		t.enqueueAllAccounts()
		return nil, nil
	}
	for namespace := range c.outcomes {
		t.enqueueTarget(targetKey{namespace, next.Target.Name()})
	}
	return nil, nil
}

// withdraw takes back what a resource had rendered that asks for nothing any more.
func (t *term) withdraw(ctx context.Context, c *claim, generation int64) error {
	if was, ok := t.rendered.Get(t.renderedKey(c.ref.UID)); ok {
		// Only this one: a leader after us may have rendered it anew.
		exactly := metav1.Preconditions{UID: &was.uid, ResourceVersion: &was.resourceVersion}
		if err := t.deleteOwn(ctx, t.config.RenderedNamespace, impsync.RenderedName(c.ref.UID), &exactly); err != nil {
			return err
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.enqueueTargetsOf(c)
	c.withdrawn, c.settled = true, generation
	c.setRendered(impsync.Rendered{}, nil)
	clear(c.outcomes)
	t.putClaim(c)
	t.enqueueAllAccounts()
	return nil
}

func sameRendered(a, b impsync.Rendered) bool {
	return maps.EqualFunc(a.Expiries, b.Expiries, time.Time.Equal) && a.FormatVersion == b.FormatVersion && a.Target.Revision() == b.Target.Revision() &&
		a.Target.SameContent(b.Target) && a.Resource.Name == b.Resource.Name && a.Rescue == b.Rescue && a.Kubelet == b.Kubelet &&
		a.SameSelectors(b)
}

// retire ends a resource that is gone or going: its rendered Secret before its claim, so
// that no agent creates anything for it any more. Its state goes first of all: where we
// die in between, the next leader learns from the rendered Secret what is left to do.
func (t *term) retire(ctx context.Context, uid types.UID) error {
	err := t.deleteOwn(ctx, t.config.Namespace, impsync.StateName(uid), nil)
	if _, ok := t.rendered.Get(t.renderedKey(uid)); ok {
		err = errors.Join(err, t.deleteOwn(ctx, t.config.RenderedNamespace, impsync.RenderedName(uid), nil))
	}
	if err != nil {
		return err
	}
	t.mu.Lock()
	c := t.claims[uid]
	delete(t.claims, uid)
	for _, claims := range t.byTarget {
		delete(claims, uid)
	}
	if c == nil {
		c = &claim{ref: impsync.ResourceRef{UID: uid}}
	}
	t.enqueueTargetsOf(c)
	t.enqueueAllAccounts()
	for key := range t.demand.states {
		if key.uid == uid {
			t.demand.forget(key)
		}
	}
	again := false
	for _, other := range t.byUID {
		again = again || other.Name == c.ref.Name && other.UID != uid
	}
	t.mu.Unlock()
	t.releaseSources(uid, nil)
	t.releaseTokens(uid)
	if !again {
		t.metrics.forget(c.ref.Name)
	}
	return nil
}

// isThere asks the API server whether there is a resource with this UID.
func (t *term) isThere(ctx context.Context, uid types.UID) (bool, error) {
	live, err := t.liveResources(ctx)
	return slices.ContainsFunc(live, func(r metav1.PartialObjectMetadata) bool { return r.UID == uid }), err
}

// liveResources asks the API server for all resources.
func (t *term) liveResources(ctx context.Context) ([]metav1.PartialObjectMetadata, error) {
	return t.readResources.do(func() ([]metav1.PartialObjectMetadata, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), impsync.CallTimeout)
		defer cancel()
		list, err := t.metadata.Resource(v1alpha1.Resource).List(ctx, metav1.ListOptions{})
		if err != nil {
			return nil, passing("list the ImagePullSecrets", err)
		}
		return list.Items, nil
	})
}

func (t *term) deleteOwn(ctx context.Context, namespace, name string, exactly *metav1.Preconditions) error {
	ctx, cancel := context.WithTimeout(ctx, impsync.CallTimeout)
	defer cancel()
	err := t.core.Secrets(namespace).Delete(ctx, name, metav1.DeleteOptions{Preconditions: exactly})
	if apierrors.IsConflict(err) {
		return fmt.Errorf("delete Secret %s/%s: %w", namespace, name, err)
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return passing(fmt.Sprintf("delete Secret %s/%s", namespace, name), err)
	}
	return nil
}
