# Settings that choose.sh and run.sh share; not run by itself. Variables: IMAGES and SCORES, the images as class folders
# (an archive) and their C-scores; OUT; SELMATCH, the command.
: "${IMAGES:=cifar10-jpeg.tar.gz}" "${SCORES:=cifar10-jpeg-cscore.npy}" "${SELMATCH:=selmatch}"
training() {  # of a part of the settings, for a number of epochs
  echo "--$1.training.epochs $2 --$1.training.batch 64 --$1.training.lr 0.05 --$1.training.momentum 0.9
    --$1.training.weight-decay 5e-4 --$1.training.schedule cosine"
}
# All images are augmented by DSA, so that curves differ by their images alone.
common="--device cpu --data.dataset imagefolder:$IMAGES --data.per-class 1000 --start.scores.source $SCORES
  --experts.model ConvNetW32 --experts.count 5 --experts.training.epochs 20 --start.features.model ConvNetW32
  --evaluation.model ConvNetW32 --evaluation.selected-strategy None --coverage-networks 1 $(training start.features 15)"
matching=inner-steps=20,expert-epochs=1,max-start-epoch=16,batch-syn=50,lr-init=0.02,keep=activations
# The gradient of DM's loss with respect to an image divides by the size of the set.
dm=dm,model=ConvNetW32,iterations=150,batch-real=128,lr-images=10:20:40:60
